"""Weights of a reduced model solved anew in closed form, layer after layer, so that errors do not pile up.

Each layer with a weight is given the inputs that it really gets in the reduced model, the layers before it being
solved already, and the output that the original has there: ridge least squares (the sequential, asymmetric
reconstruction of Zhang 2015, arXiv:1505.06798, and He 2017, arXiv:1707.06168), without any training.
"""

from featherweight.recover.recovering import Recovered, recover

__all__ = ["Recovered", "recover"]
