"""Root-to-answer paths of trees, which every extractor starts from."""

from __future__ import annotations

import io
import tokenize
import unicodedata
from collections.abc import Iterable, Sequence

from rstar.prompts import answer_fault, clean_answer, render
from rstar.tree import Node, Tree
from rstar.types import Trajectory


def path_segments(tree: Tree, node: Node) -> tuple[tuple[str, bool], ...]:
    """Segments of the path that ends in `node`: (text, whether the model wrote it)."""
    return render([(n.text, n.stdout) for n in tree.solution(node)])


def graded_answers(tree: Tree) -> list[Node]:
    """Answers with a reward in creation order, without those whose step is malformed (trees of older versions)."""
    return [leaf for leaf in tree.answers() if leaf.reward is not None and not answer_fault(leaf.text)]


def trajectories(tree: Tree) -> list[Trajectory]:
    """All graded answer paths of a tree in creation order of their answers."""
    found = []
    for leaf in graded_answers(tree):
        path = tree.path(leaf)
        known = [node.logprob for node in path if node.logprob is not None]
        found.append(
            Trajectory(
                tree_id=tree.tree_id,
                node_ids=tuple(n.id for n in path),
                segments=path_segments(tree, leaf),
                q_values=tuple(n.q_value for n in path),
                answer=leaf.answer or "",
                reward=leaf.reward or 0.0,
                codes=tuple(n.code for n in path if n.code is not None),
                multiplicity=sum(n.multiplicity for n in path) / len(path),
                logprob=sum(known) if len(known) == len(path) else float("-inf"),
                clean=clean_answer(leaf.text),
            )
        )
    return found


Content = tuple[tuple[int, str], ...]


def content(codes: Sequence[str], text: str) -> Content:
    """What a solution or step says: two with equal content are the same program, or the same words.

    Where something is run it is the program's tokens, without comments, blank lines and spacing; how it is cut into
    steps does not count, and nor does `text`. Else it is `text` in NFKC, without case and with single spaces.
    """
    return tuple(token for code in codes for token in _tokens(code)) or ((-1, _plain(text)),)


def _tokens(code: str) -> Content:
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER)
    try:
        found = [t for t in tokenize.generate_tokens(io.StringIO(code).readline) if t.type not in skipped]
    except (tokenize.TokenError, SyntaxError):  # no Python
        return ((-1, _plain(code)),) if code.strip() else ()
    layout = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    return tuple((t.type, "" if t.type in layout else t.string) for t in found)


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def distinct(found: Iterable[Trajectory]) -> list[Trajectory]:
    """The first of each content, in order."""
    first: dict[Content, Trajectory] = {}
    for one in found:
        first.setdefault(trajectory_content(one), one)
    return list(first.values())


def trajectory_content(one: Trajectory) -> Content:
    """The content of a whole solution; of one that runs nothing, the words that models wrote."""
    return content(one.codes, "".join(text for text, own in one.segments if own))


def provenance(tree: Tree, node_ids: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """Where nodes come from, as rows name it: (tree id, node ids).

    For a merged tree these are of the first source that has all of the nodes; where none has, they are of the merged
    tree, which merging the sources in id order gives again.
    """
    sources = [dict(tree.nodes[i].meta.get("sources", ())) for i in node_ids]
    shared = next((name for name in sources[0] if all(name in one for one in sources)), None)
    if shared is None:
        return tree.tree_id, tuple(node_ids)
    return shared, tuple(one[shared] for one in sources)


def ranked(found: Iterable[Trajectory]) -> list[Trajectory]:
    """Best first: by mean Q over the steps (root excluded, answer step included), ties by the smallest Q (G5).

    Where all Q are equal, as for a problem that is always solved, the solution that the policy writes most often comes
    first: by multiplicity, then log-probability, then creation.
    """
    return sorted(found, key=lambda t: (t.mean_q, min(t.q_values), t.multiplicity, t.logprob), reverse=True)
