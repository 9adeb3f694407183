"""Everything that needs a GPU, in one command that a GPU at hand for minutes is enough for: see `command`."""
