"""Bounds, effects, the integer program, and the loop that lets measurement correct prediction."""
