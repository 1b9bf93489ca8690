"""One page that shows a run: its course, its evaluation, and its videos before and after."""
