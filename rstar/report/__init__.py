"""What a person sees of a run: live progress, the table, one tree as text, the HTML report."""
