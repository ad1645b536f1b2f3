"""Everything that wants a GPU, in one go, on a machine without network."""
