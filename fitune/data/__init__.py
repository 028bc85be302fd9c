"""From rows of any usual format to checked conversations and their tokens."""
