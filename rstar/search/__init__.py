"""Searchers: each turns a Problem into a Tree. Models, sandbox and grader are injected; no engine types in here."""
