"""Laws of the loss: sums of power laws, fitted to the losses of a few trained models.

    granularity  L = c + (g / G^gamma + a) / N^alpha + b / D^beta   (arXiv 2402.07871)
    compute      L = E + A / C^alpha

G granularity (how many times an expert is smaller than a standard FFN), N parameters, D tokens, C
training FLOPs; the loss in nats per token.  A sweep at one N or D cannot tell their terms apart, so
there are shorter forms, and the data decide which one is fitted (`granularity_form`).

Coefficients are never negative.  For given exponents they follow by non-negative least squares, so
only the exponents are searched, in logarithms and within `EXPONENTS`, from several starts.

Shapes: P points (models), S seeds, R resamples, X places where a law is drawn.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize

from dsmoe_jax.study.resampling import Interval, interval, resampled_means

EXPONENTS = (0.02, 4.0)  # their range; nearer to 0 a power law is a logarithm
STARTS = (0.1, 0.4, 1.2)
VARIES = 1.5  # largest over smallest, from which on a quantity varies enough for a law
FAR = 10.0  # times beyond the fitted range, from which on a law says nothing

Variables = Mapping[str, np.ndarray]


class Term(NamedTuple):
    """A summand of a law: coefficient / (variable^exponent ...).

    Attributes:
      coefficient: its name.
      powers: variable -> name of its exponent.
    """

    coefficient: str
    powers: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Form:
    """A law without its numbers."""

    text: str
    terms: tuple[Term, ...]

    @property
    def exponents(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(dict.fromkeys(name for term in self.terms for name in term.powers.values()))

    @property
    def variables(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(dict.fromkeys(name for term in self.terms for name in term.powers))

    @property
    def size(self) -> int:
        """Number of its constants."""
        return len(self.terms) + len(self.exponents)


_FLOOR = Term("c", {})
_GRANULARITY = Term("g", {"G": "gamma", "N": "alpha"})
_SIZE = Term("a", {"N": "alpha"})
_TOKENS = Term("b", {"D": "beta"})
_COMPUTE = Term("A", {"C": "alpha"})

FORMS: dict[str, Form] = {
    "full": Form(
        "L = c + (g / G^gamma + a) / N^alpha + b / D^beta",
        (_FLOOR, _GRANULARITY, _SIZE, _TOKENS),
    ),
    "one D": Form("L = c + (g / G^gamma + a) / N^alpha", (_FLOOR, _GRANULARITY, _SIZE)),
    "one N and D": Form("L = c + g / G^gamma", (_FLOOR, Term("g", {"G": "gamma"}))),
    "compute": Form("L = E + A / C^alpha", (Term("E", {}), _COMPUTE)),
    "compute, E = 0": Form("L = A / C^alpha", (_COMPUTE,)),
}


@dataclasses.dataclass(frozen=True)
class Fit:
    """A law with its numbers.

    Attributes:
      form: a key of `FORMS`.
      constants: by name; an exponent is None where the coefficients that it belongs to are 0.
      ranges: smallest and largest value of each variable in the data.
      error: root mean square of what the law leaves over, nats per token.
      spare: points minus constants; 0 or less means that the law is not tested by the data.
      converged: whether the search for the exponents ended.
    """

    form: str
    constants: Mapping[str, float | None]
    ranges: Mapping[str, tuple[float, float]]
    error: float
    spare: int
    converged: bool

    def predict(self, **variables: Any) -> np.ndarray:
        """The loss that the law gives, (X,), at `variables`, each (X,) or one number."""
        loss_X = np.zeros(np.broadcast_shapes(*(np.shape(x) for x in variables.values())))
        for term in FORMS[self.form].terms:
            value_X = np.asarray(self.constants[term.coefficient], np.float64)
            if value_X == 0:
                continue
            for variable, exponent in term.powers.items():
                power = self.constants[exponent]
                assert power is not None, "the coefficient is not 0"
                value_X = value_X * np.asarray(variables[variable], np.float64) ** -power
            loss_X = loss_X + value_X
        return loss_X

    def remarks(self) -> list[str]:
        """Facts that must be known before the numbers are believed, a sentence each."""
        form = FORMS[self.form]
        said = [] if self.converged else ["The search for the exponents did not converge."]
        if self.spare <= 0:
            said.append(
                f"{form.size} constants for {form.size + self.spare} models: nothing is left to"
                " test the law."
            )
        for name in form.exponents:
            value = self.constants[name]
            if value is None:
                said.append(f"{name} does not exist: what it would explain is 0.")
            elif math.isclose(value, EXPONENTS[0], rel_tol=1e-3):
                said.append(
                    f"{name} is at the edge of its range, {EXPONENTS[0]:g}: the losses follow a"
                    " logarithm as well as a power, and the constants beside it mean nothing."
                )
            elif math.isclose(value, EXPONENTS[1], rel_tol=1e-3):
                said.append(
                    f"{name} is at the edge of its range, {EXPONENTS[1]:g}: only the smallest"
                    " model differs from the others."
                )
        return said


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A law fitted to the means over seeds, and to their resamples.

    Attributes:
      fit: to the means.
      resampled: to each resample; () with fewer than two seeds.
      reason: why this form was fitted, a sentence.
    """

    fit: Fit
    resampled: tuple[Fit, ...]
    reason: str = ""

    def interval(self, constant: str) -> Interval | None:
        """95 % interval of a constant.

        Returns:
          None with fewer than two seeds, and where in more than 2.5 % of the resamples the
          constant does not exist.
        """
        values = [fit.constants[constant] for fit in self.resampled]
        known = [value for value in values if value is not None]
        if not known or len(known) < 0.975 * len(values):
            return None
        return interval(np.array(known))

    def band(self, **variables: Any) -> tuple[np.ndarray, np.ndarray] | None:
        """Ends of the 95 % interval of the loss, each (X,); None with fewer than two seeds."""
        if not self.resampled:
            return None
        losses_RX = np.array([fit.predict(**variables) for fit in self.resampled])
        low_X, high_X = np.quantile(losses_RX, (0.025, 0.975), axis=0)
        return low_X, high_X


def fit_law(
    form: str,
    variables: Mapping[str, Any],
    loss_P: Any,
    starts: Iterable[Mapping[str, float]] | None = None,
) -> Fit:
    """Fits a law by least squares.

    Args:
      form: a key of `FORMS`.
      variables: those of the form, each (P,) and above 0.
      loss_P: nats per token.
      starts: exponents from which the search begins; None is all combinations of `STARTS`.

    Raises:
      ValueError: for values that are not finite, or variables that are not above 0.
    """
    names = FORMS[form].exponents
    loss_P = np.asarray(loss_P, np.float64)
    logs = {name: _log(name, variables[name], len(loss_P)) for name in FORMS[form].variables}
    if not np.isfinite(loss_P).all():
        raise ValueError(f"losses={loss_P.tolist()}: must be finite")
    centres = {name: float(log_P.mean()) for name, log_P in logs.items()}
    centred = {name: log_P - centres[name] for name, log_P in logs.items()}

    def solve(log_exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        powers = dict(zip(names, np.exp(log_exponents), strict=True))
        columns_PT = _columns(FORMS[form], centred, powers, len(loss_P))
        coefficients_T, _ = optimize.nnls(columns_PT, loss_P)
        return coefficients_T, columns_PT @ coefficients_T - loss_P

    if starts is None:
        grid = itertools.product(STARTS, repeat=len(names))
        starts = [dict(zip(names, values, strict=True)) for values in grid]
    best = min((_search(solve, names, start) for start in starts), key=lambda found: found.cost)
    coefficients_T, left_P = solve(best.x)
    powers = dict(zip(names, np.exp(best.x).tolist(), strict=True))
    return Fit(
        form,
        _constants(FORMS[form], coefficients_T, powers, centres),
        {name: (math.exp(min(log_P)), math.exp(max(log_P))) for name, log_P in logs.items()},
        error=float(np.sqrt(np.mean(left_P**2))),
        spare=len(loss_P) - FORMS[form].size,
        converged=bool(best.status > 0),
    )


def _log(name: str, values: Any, n_points: int) -> np.ndarray:
    values_P = np.broadcast_to(np.asarray(values, np.float64), n_points)
    if not (np.isfinite(values_P).all() and (values_P > 0).all()):
        raise ValueError(f"{name}={values_P.tolist()}: must be finite and above 0")
    return np.log(values_P)


def _columns(form: Form, logs: Variables, powers: Mapping[str, float], n: int) -> np.ndarray:
    """Factor of each coefficient, (P, T)."""
    columns = []
    for term in form.terms:
        log_P = np.zeros(n)
        for variable, exponent in term.powers.items():
            log_P = log_P - powers[exponent] * logs[variable]
        columns.append(np.exp(log_P))
    return np.stack(columns, axis=1)


def _search(solve: Any, names: Sequence[str], start: Mapping[str, float]) -> Any:
    """The exponents of least error from one start, as `scipy.optimize.least_squares` reports."""
    low, high = np.log(EXPONENTS)
    # Inside the bounds, as the search wants it.
    x = np.clip(np.log([start[name] for name in names]), low + 1e-6, high - 1e-6)
    return optimize.least_squares(
        lambda x: solve(x)[1], x, bounds=(low, high), ftol=1e-12, xtol=1e-10, gtol=1e-14
    )


def _constants(
    form: Form,
    coefficients_T: np.ndarray,
    powers: Mapping[str, float],
    centres: Mapping[str, float],
) -> dict[str, float | None]:
    """All constants for variables that are not centred."""
    found: dict[str, float | None] = dict.fromkeys(form.exponents)
    for term, value in zip(form.terms, coefficients_T.tolist(), strict=True):
        shift = sum(powers[e] * centres[variable] for variable, e in term.powers.items())
        found[term.coefficient] = value * math.exp(shift)
        if value:
            found |= {exponent: powers[exponent] for exponent in term.powers.values()}
    return found


def estimate(
    form: str,
    variables: Mapping[str, Any],
    losses_SP: Any,
    *,
    reason: str = "",
) -> Estimate:
    """Fits a law to the means over seeds, and to resamples of the seeds.

    Args:
      form: a key of `FORMS`.
      variables: those of the form, each (P,).
      losses_SP: a row a seed; a seed has all models.
      reason: see `Estimate`.

    Raises:
      ValueError: see `fit_law`.
    """
    losses_SP = np.asarray(losses_SP, np.float64)
    fit = fit_law(form, variables, losses_SP.mean(axis=0))
    means_RP = resampled_means(losses_SP)
    if means_RP is None:
        return Estimate(fit, (), reason)
    middle = STARTS[len(STARTS) // 2]
    near = {name: fit.constants[name] or middle for name in FORMS[form].exponents}
    resampled = tuple(fit_law(form, variables, mean_P, [near]) for mean_P in means_RP)
    return Estimate(fit, resampled, reason)


def granularity_form(G_P: Any, N_P: Any, D_P: Any) -> tuple[str, str]:
    """The form of the granularity law that the data can tell, and the reason in words.

    Args:
      G_P, N_P, D_P: granularity, parameters and tokens of the models.

    Raises:
      ValueError: where no form fits: too few granularities, or tokens that vary alone.
    """
    values = {"G": np.asarray(G_P, np.float64)}
    values["N"] = np.asarray(N_P, np.float64)
    values["D"] = np.asarray(D_P, np.float64)
    n_points = len(values["G"])
    n_granularities = len(np.unique(values["G"]))
    if n_granularities < 3:
        raise ValueError(
            f"granularities={np.unique(values['G']).tolist()}: the law needs three different ones"
        )
    varying = [name for name in "ND" if values[name].max() >= VARIES * values[name].min()]
    if not varying:
        return "one N and D", "All models have the same N and D, so their terms are part of c."
    form = {"N": "one D", "ND": "full"}.get("".join(varying))
    if form is None:
        raise ValueError(
            f"tokens={sorted(set(values['D'].tolist()))}: differ between models of one size; the"
            " law needs one number of tokens, or sizes that vary too"
        )
    logs = np.stack([np.log(values[name]) for name in ("G", *varying)])
    if n_points <= FORMS[form].size or np.linalg.matrix_rank(np.cov(logs), tol=1e-6) < len(logs):
        raise ValueError(
            f"models={n_points}: {' and '.join(('G', *varying))} must vary independently, in more"
            f" than {FORMS[form].size} models, for {FORMS[form].text}"
        )
    if form == "one D":
        return form, "All models have the same D, so its term is part of c."
    return form, "G, N and D all vary."


def granularity_law(G_P: Any, N_P: Any, D_P: Any, losses_SP: Any) -> Estimate:
    """The law of 2402.07871 in the form that the data can tell, see `granularity_form`."""
    form, reason = granularity_form(G_P, N_P, D_P)
    return estimate(form, {"G": G_P, "N": N_P, "D": D_P}, losses_SP, reason=reason)


def compute_law(C_P: Any, losses_SP: Any) -> Estimate:
    """The loss of models of growing compute, with E if the data can tell it.

    E is fitted from four models and two seeds on, and kept if its interval excludes 0.  Else it is
    0: more compute then lowers the loss for ever, so that beyond the largest model a lower loss
    seems to take less compute than it does.

    Args:
      C_P: training FLOPs.
      losses_SP: a row a seed.

    Raises:
      ValueError: for fewer than three models, or compute that hardly varies.
    """
    C_P = np.asarray(C_P, np.float64)
    n_models = len(np.unique(C_P))
    if n_models < 3 or C_P.max() < VARIES * C_P.min():
        raise ValueError(
            f"compute={C_P.tolist()}: the law needs three models of different compute, the largest"
            f" with {VARIES:g} times that of the smallest or more"
        )
    losses_SP = np.asarray(losses_SP, np.float64)
    n_seeds = len(losses_SP)
    reason = f"E cannot be known from {n_models} models with {n_seeds} seed(s); it is set to 0."
    if n_models >= 4 and n_seeds >= 2:
        with_floor = estimate("compute", {"C": C_P}, losses_SP)
        floor = with_floor.interval("E")
        assert floor is not None, "there are two seeds"
        if floor.low > 0:
            return dataclasses.replace(with_floor, reason="The interval of E excludes 0.")
        reason = "E cannot be told from 0 by these models and seeds; it is set to 0."
    return estimate("compute, E = 0", {"C": C_P}, losses_SP, reason=reason)


def compute_for(fit: Fit, loss: float) -> float:
    """The compute at which a law of compute reaches a loss; inf at its floor or below.

    Raises:
      ValueError: if the law's loss does not fall with compute.
    """
    scale = fit.constants["A"]
    power = fit.constants["alpha"]
    if not scale or power is None:
        raise ValueError("A=0: the baseline's loss does not fall with compute")
    above = loss - (fit.constants.get("E") or 0.0)
    if above <= 0:
        return math.inf
    log_compute = (math.log(scale) - math.log(above)) / power
    return math.exp(log_compute) if log_compute < 700 else math.inf  # 1e304: as good as never


def effective_compute(fit: Fit, loss: float, reference: float) -> float:
    """Compute that the law needs to reach a loss, over `reference`; inf if it never does.

    Raises:
      ValueError: see `compute_for`.
    """
    return compute_for(fit, loss) / reference


def reach(fit: Fit, variable: str, value: float) -> float:
    """Factor by which a value lies outside the fitted range; 1 inside."""
    low, high = fit.ranges[variable]
    return max(low / value, value / high, 1.0)
