"""Why a trick cannot apply in principle: one sentence for each reason that a pass gives."""

from __future__ import annotations

import dataclasses
import re

__all__ = ["NO_CACHE", "PRINCIPLES", "Principle", "principle"]

NO_CACHE = "there is no cache"
"""What the survey says for a pass where a model keeps no cache."""


@dataclasses.dataclass(frozen=True)
class Principle:
    """A reason that no recogniser can get around.

    Attributes:
        trick: The pass that gives it.
        pattern: A regular expression found in the pass's own words.
        sentence: What a reader is told.
    """

    trick: str
    pattern: str
    sentence: str


def _fold(pattern: str, sentence: str) -> Principle:
    return Principle("fold-norm", pattern, sentence)


def _table(pattern: str, sentence: str) -> Principle:
    return Principle("precompute-first-layer", pattern, sentence)


def _slim(pattern: str, sentence: str) -> Principle:
    return Principle("slim-attention", pattern, sentence)


PRINCIPLES = (
    _fold(
        "as a residual connection does",
        "The norm's output enters the residual stream (post-norm), which every later layer reads "
        "through a sum: its gain is part of the function and has no weight to move into.",
    ),
    _fold(
        "adds a constant to it",
        "A layer over other axes than the channels, or a table of positions, adds a constant to "
        "the norm's output, which its gain would have to scale, too.",
    ),
    _fold(
        "multiplies it with something that is not a constant weight",
        "The norm is one of queries or keys: its gain acts between two values of the input, and "
        "neither side of their product is a weight.",
    ),
    _fold(
        "adds its channels to one another, as rotary positions do",
        "The norm is one of queries or keys, which are rotated: each channel is added to another "
        "with another gain, by an angle that depends on the position.",
    ),
    _fold(
        "takes it as queries, keys or values",
        "The norm is one of queries or keys, which one operator rotates and multiplies.",
    ),
    _fold(
        "multiplies all heads of it with one weight",
        "The norm's output is cut into heads that share a weight, while its gain differs from head "
        "to head.",
    ),
    _fold(
        r"Gather '.*' reads rows and channels that lie on one axis",
        "An index computed at run time picks single numbers of all rows and channels "
        "(`as_strided`): nothing says which channel each of them is.",
    ),
    _fold(
        "joins it with rows that are not scaled alike",
        "Rows without this gain (a class token, a head with a norm of its own) join it before they "
        "are read: one weight multiplies them all.",
    ),
    _fold(
        "is an output of the graph",
        "The norm's output leaves the model: callers read it with the gain in it.",
    ),
    _fold(
        "is not linear in it",
        "A nonlinear operator reads the norm's output, another norm for example.",
    ),
    _fold(
        "normalises more than the last axis",
        "The norm has a gain for each head, or spans several axes: no rows of one weight match it.",
    ),
    _fold(
        "is also read by",
        "The weight has a reader that does not see the norm, too: `--shared-weights` decides.",
    ),
    _table(
        r"\(positions or token types\)",
        "Something that depends on the position or the token type is added to the embedding "
        "before the first linear layer, so that its result depends on more than the token.",
    ),
    _table(
        "no Gather looks up token ids",
        "There is no table of tokens: the model takes images, sound, numbers or embeddings.",
    ),
    _table(
        "no linear layer with constant weights lies between",
        "The embedding is changed by something else than the token before the first linear layer: "
        "padding zeroed by the mask, images put in its place, neighbouring embeddings beside it.",
    ),
    _slim(NO_CACHE, "The model keeps no cache: nothing is saved."),
    _slim(
        "cannot determine an input of",
        "Keys are shared by several heads (GQA, MQA) or narrower than the input, so that values "
        "do not follow from them.",
    ),
    _slim(
        "numbers is no less than",
        "Keys and values together are no larger than the layer's input, so that caching the "
        "input saves nothing.",
    ),
    _slim(
        "sinks of attention",
        "Attention sinks put a learned score beside those of the keys.",
    ),
    _slim("Clip '", "Clipped keys and values are no linear function of one another."),
    _slim(
        "chosen anew at every step, for new tokens alone",
        "Long RoPE turns new keys by other angles beyond a length, and leaves cached ones as they "
        "are.",
    ),
    _slim(
        "joins channels that do not come from one projection",
        "Latent attention makes a key of two projections, one of them shared by all heads.",
    ),
)
"""In the order in which documents letter them."""


def principle(trick: str, reason: str) -> Principle | None:
    """The principle behind a reason; None where there is none, which is a defect.

    Args:
        trick: The pass that gave the reason.
        reason: Its words.
    """
    for one in PRINCIPLES:
        if one.trick == trick and re.search(one.pattern, reason):
            return one
    return None
