"""Feedforward computation as a triangular system of equations, solved in parallel, with the same result."""
