"""What a user says of an edited loop, to be held to it: tensors that do not move, and rates that are a part of it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from babl.errors import UserError


@dataclass
class Statements:
    """Patterns of parameter names, as the shell's: `encoder.*`.

    Attributes:
        fixed: These parameters do not move.
        rates: These have this part of the learning rate; the last pattern that matches counts.
    """

    fixed: Sequence[str] = ()
    rates: dict[str, float] = field(default_factory=dict)

    def fixes(self, name: str) -> bool:
        """Returns whether the parameter is said not to move."""
        return any(fnmatchcase(name, pattern) for pattern in self.fixed)

    def factor(self, name: str) -> float:
        """Returns the part of the learning rate that the parameter is said to have."""
        factors = [factor for pattern, factor in self.rates.items() if fnmatchcase(name, pattern)]
        return factors[-1] if factors else 1.0

    def states_rate(self, name: str) -> bool:
        """Returns whether anything is said of the parameter's rate."""
        return any(fnmatchcase(name, pattern) for pattern in self.rates)

    def check(self, names: Iterable[str]) -> None:
        """Every pattern means something.

        Args:
            names: Of the parameters of every model that the script is run on.

        Raises:
            UserError: One matches no parameter.
        """
        names = sorted(set(names))
        for option, patterns in (("--fixed", self.fixed), ("--rate", self.rates)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    first = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
                    raise UserError(f"{option} {pattern}: no parameter is called so; their names begin with {first}")


def parse(fixed: Sequence[str], rates: Sequence[str]) -> Statements:
    """Returns the statements of a command line.

    Args:
        fixed: Patterns.
        rates: Each `PATTERN=FACTOR`.

    Raises:
        UserError: A factor is not a number above 0.
    """
    factors = {}
    for text in rates:
        pattern, _, factor = text.rpartition("=")
        try:
            factors[pattern] = float(factor)
        except ValueError:
            factors[pattern] = math.nan
        if not pattern or not 0 < factors[pattern] < math.inf:
            raise UserError(f"--rate {text}: expected PATTERN=FACTOR with a factor above 0, such as 'encoder.*=0.1'")
    return Statements(fixed, factors)


def listed(names: Sequence[str], total: int) -> str:
    """Returns in a few words which of `total` parameters these are."""
    first = ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
    return f"{len(names)} of {total} parameters ({first})"
