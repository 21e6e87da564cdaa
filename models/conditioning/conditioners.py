"""Builds a conditioner from its options."""

from models.checks import conditioner_problems, refuse_first
from models.conditioning.conditioner import Conditioner
from models.config import ConditionerConfig
from models.config.conditioning import CONDITIONERS
from models.config.targets import resolve


def conditioner_class(config: ConditionerConfig) -> type[Conditioner]:
    """Return the class of `config.kind`."""
    return resolve(CONDITIONERS[config.kind].conditioner)


def build_conditioner(config: ConditionerConfig) -> Conditioner:
    """Build the conditioner of the options.

    Raises: ValueError or FileNotFoundError, naming the option, if it cannot be built.
    """
    refuse_first(conditioner_problems(config))
    return conditioner_class(config)(config)
