"""How alike two layers' representations are: CKA with a linear kernel and unbiased minibatch HSIC.

Kornblith et al. 2019 (arXiv 1905.00414); the unbiased estimator of Song et al. 2012; its use batch
by batch, Nguyen et al. 2021 (arXiv 2010.15327).

Shapes: N examples, D columns of a representation, L layers.
"""

import dataclasses

import numpy as np

from engram_jax.config import require

LEAST = 4  # examples of a batch that the unbiased estimator needs


def hsic(gram_NN: np.ndarray, other_NN: np.ndarray) -> float:
    """The unbiased estimate of HSIC of two Gram matrices, float64; its diagonals are not read.

        HSIC = (tr(K L) + 1'K1 1'L1 / ((n - 1)(n - 2)) - 2 1'KL1 / (n - 2)) / (n (n - 3))

    Raises:
      UserError: fewer than four examples.
    """
    count = len(gram_NN)
    require(count >= LEAST, "examples", count, f"must be at least {LEAST} in a batch of CKA")
    k, other = _hollow(gram_NN), _hollow(other_NN)
    sum_k, sum_other = k.sum(axis=0), other.sum(axis=0)
    return float(
        (np.sum(k * other) + sum_k.sum() * sum_other.sum() / ((count - 1) * (count - 2))
         - 2 * sum_k @ sum_other / (count - 2)) / (count * (count - 3)))


def _hollow(gram_NN: np.ndarray) -> np.ndarray:
    hollow = np.array(gram_NN, np.float64)
    np.fill_diagonal(hollow, 0)
    return hollow


def gram(x_ND: np.ndarray) -> np.ndarray:
    """The linear kernel of centred representations, float64 [N, N]."""
    centred = np.asarray(x_ND, np.float64)
    centred = centred - centred.mean(axis=0)[None]
    return centred @ centred.T


@dataclasses.dataclass
class Similarity:
    """CKA between all layers of two models, batch after batch.

    Attributes:
      cross: sums over batches of HSIC of each pair of layers [L, L'].
      own, other: of each layer with itself.
    """

    cross: np.ndarray
    own: np.ndarray
    other: np.ndarray

    @classmethod
    def between(cls, layers: int, other_layers: int) -> "Similarity":
        """Nothing added yet."""
        return cls(np.zeros((layers, other_layers)), np.zeros(layers), np.zeros(other_layers))

    def add(self, ours_LND: np.ndarray, theirs_LND: np.ndarray) -> None:
        """Add a batch: each layer's representations of the same N examples."""
        ours, theirs = [gram(x) for x in ours_LND], [gram(x) for x in theirs_LND]
        self.own += [hsic(k, k) for k in ours]
        self.other += [hsic(k, k) for k in theirs]
        self.cross += [[hsic(k, other) for other in theirs] for k in ours]

    def cka(self) -> np.ndarray:
        """float64 [L, L']: 1 where layers are the same up to rotation and scale, about 0 where they
        have nothing to do with each other."""
        return self.cross / np.sqrt(np.outer(self.own, self.other))


def soft_alignment(cka_LL: np.ndarray, top: int = 5) -> np.ndarray:
    """For each layer of the second model the layer of the first that it is like: [L'].

    The mean of the `top` most similar layers' numbers, weighed by their similarity (the paper's
    section 6; layers 0-based).
    """
    top = min(top, len(cka_LL))
    order = np.argsort(-cka_LL, axis=0, kind="stable")[:top]
    weight = np.maximum(np.take_along_axis(cka_LL, order, axis=0), 0)
    return np.sum(order * weight, axis=0) / np.maximum(weight.sum(axis=0), 1e-12)
