"""What filter is made of: which pairs, their tables, their blocks, their picture."""
