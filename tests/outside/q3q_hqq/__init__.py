"""A method as another package would offer it: HQQ, whose zero points are no whole numbers."""
