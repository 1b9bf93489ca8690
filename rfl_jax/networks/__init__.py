"""The networks of a run: where they come from, how they are opened, what of them trains."""
