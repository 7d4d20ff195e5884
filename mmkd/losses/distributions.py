"""What the losses between two next-token distributions have in common: softmaxes, their log-ratio, checks.

Shapes: `student` and `teacher` are logits `[R, V]` of the same rows and the same vocabulary. The closed forms compute in float32,
where the log-ratio of two distributions is formed as `(teacher - student) - (lse_teacher - lse_student)` with the two
log-normalisers, one number a row, in float64: a rounding error there would be the same for the whole row and would not average
out over V. A row of nothing but -inf has no distribution and gives NaN; any other -inf never does.
"""

import math

import torch
from torch import Tensor

from mmkd.losses.numerics import exact, exact_dtype

# Log-ratios of an impossible token are replaced by +-this: exp(-200) is 0 in float32, 1e-87 in float64.
FAR = 200.0
# A logit that stands for -inf where, with nothing else left, -inf would give NaN.
ABSENT = -1e30


def check_temperature(temperature: float) -> None:
    if not temperature > 0.0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")


def check_same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} differ; "
            "gather the same rows and cut both vocabularies to the same length"
        )


def wide(x: Tensor) -> Tensor:
    """float32, or float64 as it is: the precision of the closed forms."""
    return x if x.dtype == torch.float64 else x.float()


def scaled(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Both logits over the temperature, in the precision of the functions. Raises ValueError for unequal shapes."""
    check_temperature(temperature)
    check_same_shape(student, teacher)
    student, teacher = exact(student), exact(teacher)
    if temperature == 1.0:
        return student, teacher
    return student / temperature, teacher / temperature


def log_ratio(student: Tensor, teacher: Tensor) -> Tensor:
    """log p/q `[R, V]`, with 0 where both logits are -inf and +-FAR where one of them is."""
    shift = teacher.logsumexp(-1, keepdim=True) - student.logsumexp(-1, keepdim=True)  # [R, 1]
    gone_s, gone_t = student == -math.inf, teacher == -math.inf  # [R, V]
    d = teacher.masked_fill(gone_t, 0.0) - student.masked_fill(gone_s, 0.0) - shift  # [R, V]
    d = d.masked_fill(gone_s, FAR).masked_fill(gone_t, -FAR)
    return d.masked_fill(gone_s & gone_t, 0.0)


def kept_terms(terms: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """The terms `[R, V]` of a sum over the vocabulary, 0 where either logit is -inf."""
    return terms.masked_fill((student == -math.inf) | (teacher == -math.inf), 0.0)


def dropped(weights: Tensor, logits: Tensor) -> Tensor:
    """The weights `[R, V]`, 0 where the logits are -inf."""
    # Comparing into floats is several times as fast on a CPU as multiplying by bools.
    return torch.ne(logits, -math.inf, out=torch.empty_like(weights)).mul_(weights)


def log_mixture(d: Tensor, beta: float) -> Tensor:
    """log of `(1 - beta) + beta e^d` less `max(d, 0)`, without overflow and exact for small d.

    With L this number: log m/q = max(d, 0) + L and log m/p = max(-d, 0) + L.
    """
    # The weight of the smaller of p and q in m: beta where p is the smaller (d < 0), 1 - beta where q is.
    weight = (d > 0).to(d.dtype).mul_(1 - 2 * beta).add_(beta)  # [R, V]
    return (weight * torch.expm1(-d.abs())).log1p()


def distribution(logits: Tensor, temperature: float, who: str, shared: dict | None) -> tuple[Tensor, Tensor]:
    """softmax(logits / T) `[R, V]` and its log-normaliser `[R]` (float64); taken from `shared` if a term made it
    before.

    What lies in `shared` is read by other terms: never change it in place.
    """
    key = (who, temperature)
    if shared is not None and key in shared:
        return shared[key]
    q = torch.softmax(logits if temperature == 1.0 else logits / temperature, -1)  # [R, V]
    # The largest probability is exp(0) / Σ, so its log gives Σ without another pass of exp.
    dtype = exact_dtype(logits)
    normaliser = logits.amax(-1).to(dtype) / temperature - q.amax(-1).to(dtype).log()  # [R]
    if shared is not None:
        shared[key] = (q, normaliser)
    return q, normaliser


def pair(student: Tensor, teacher: Tensor, temperature: float, shared: dict | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, p and log p/q, all `[R, V]`; the last finite as in `log_ratio`, and like the others not to be changed."""
    student, teacher = wide(student), wide(teacher)
    q, normaliser_s = distribution(student, temperature, "student", shared)
    p, normaliser_t = distribution(teacher, temperature, "teacher", shared)
    key = ("ratio", temperature)
    if shared is not None and key in shared:
        return q, p, shared[key]
    d = teacher - student  # [R, V]
    if temperature != 1.0:
        d.div_(temperature)
    # The normalisers come after: a NaN among the logits makes them NaN, and so is not hidden by this
    # replacement.
    d.nan_to_num_(0.0, FAR, -FAR)
    d.sub_((normaliser_t - normaliser_s).to(d.dtype).unsqueeze(-1))
    if shared is not None:
        shared[key] = d
    return q, p, d
