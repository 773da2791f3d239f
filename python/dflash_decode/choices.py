"""The words that an argument or an option chooses from. No package but the standard library: the command line's help
needs them and loads nothing else."""

from enum import Enum

AUTO, RANDOM, NONE = "auto", "random", "none"  # drafters that are no directory


class SampleFrom(str, Enum):
    """How drafts of sampled requests are made: the most likely tokens, or drawn as the request draws."""

    greedy = "greedy"
    request = "request"


class Rule(str, Enum):
    """How drawn drafts are accepted: verify_sample's rules."""

    token = "token"
    block = "block"


class Weights(str, Enum):
    """What the target's weights are kept in."""

    auto = "auto"
    model = "model"
    int8 = "int8"
    file = "file"
    exact = "exact"


class DraftersWeights(str, Enum):
    """What the drafter's weights are kept in."""

    auto = "auto"
    int8 = "int8"
    model = "model"
