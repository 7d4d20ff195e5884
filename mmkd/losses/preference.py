"""Preference losses with the teacher as the reference (LLaVA-MoD, arXiv 2408.15881, preference distillation).

All inputs are `[B]`: summed log-probabilities of the response tokens of a chosen and a rejected answer, under
student and teacher. `r(y) = log p_student(y) - log p_teacher(y)`. The teacher's values carry no gradient
(detached here).
"""

import torch
from torch import Tensor

from mmkd.losses.numerics import exact, result_dtype

FORMS = ("sigmoid", "hinge", "ipo")
BETA = 0.1  # the default of LLaVA-MoD's code; the paper's value was not seen


def dpo(
    chosen_student: Tensor,
    rejected_student: Tensor,
    chosen_teacher: Tensor,
    rejected_teacher: Tensor,
    beta: float = BETA,
    label_smoothing: float = 0.0,
    form: str = "sigmoid",
) -> Tensor:
    """`-log sigmoid(beta (r(y+) - r(y-)))` of each pair; returns `[B]`.

    form: "sigmoid" as above; "hinge": `max(0, 1 - beta (r(y+) - r(y-)))` (SLiC, arXiv 2305.10425); "ipo":
    `(r(y+) - r(y-) - 1 / (2 beta))²` (arXiv 2310.12036, eq. 17). LLaVA-MoD's code has all three, its scripts use none.
    label_smoothing: the share e of pairs that are taken to be the wrong way round, below 0.5: the loss is
    `-(1 - e) log sigmoid(x) - e log sigmoid(-x)` (LLaVA-MoD's code has it at 0); of the sigmoid form only.
    Raises ValueError beyond, for an unknown form, and for shapes other than four times `[B]`.

    Source: DPO (arXiv 2305.18290, eq. 7), here with the teacher as reference as in LLaVA-MoD. Beta 0.1 is the
    default of LLaVA-MoD's code. Unlike DPO with a frozen copy of the student, it does not start at log 2.
    """
    chosen, rejected = _rewards(
        chosen_student, rejected_student, chosen_teacher, rejected_teacher
    )  # [B] each
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be at least 0 and below 0.5")
    if form not in FORMS or (form != "sigmoid" and label_smoothing):
        raise ValueError(
            f"form is {form!r} with label_smoothing {label_smoothing}; choose sigmoid, or hinge or ipo without smoothing"
        )
    margin = beta * (chosen - rejected)  # [B]
    softplus = torch.nn.functional.softplus
    if form == "hinge":
        values = torch.relu(1 - margin)
    elif form == "ipo":
        values = (chosen - rejected - 1 / (2 * beta)).square()
    else:
        values = (1 - label_smoothing) * softplus(-margin) + label_smoothing * softplus(margin)
    return values.to(result_dtype(chosen_student, rejected_student))


def kto_pair(
    chosen_student: Tensor,
    rejected_student: Tensor,
    chosen_teacher: Tensor,
    rejected_teacher: Tensor,
    beta: float = BETA,
    detach_kl: bool = True,
    kl: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Paired KTO: `1 - sigmoid(beta (r(y+) - KL-))` of each chosen, then `1 - sigmoid(beta (KL+ - r(y-)))` of
    each rejected answer; returns `[2B]`, chosen first.

    `KL+ = max(0, mean r(y+))`, `KL- = max(0, mean r(y-))` over the batch. detach_kl: no gradient through them
    (our default; LLaVA-MoD's code does not detach). kl: the pair (KL+, KL-) from outside instead, for a mean
    over all ranks. Source: KTO (arXiv 2402.01306), paired form of LLaVA-MoD's code.
    """
    chosen, rejected = _rewards(
        chosen_student, rejected_student, chosen_teacher, rejected_teacher
    )  # [B] each
    kl_chosen, kl_rejected = (chosen.mean().clamp(min=0), rejected.mean().clamp(min=0)) if kl is None else kl
    if detach_kl:
        kl_chosen, kl_rejected = kl_chosen.detach(), kl_rejected.detach()
    # 1 - sigmoid(x) is sigmoid(-x), without the cancellation for large x.
    values = torch.cat([torch.sigmoid(-beta * (chosen - kl_rejected)), torch.sigmoid(-beta * (kl_chosen - rejected))])
    return values.to(result_dtype(chosen_student, rejected_student))


def _rewards(
    chosen_student: Tensor, rejected_student: Tensor, chosen_teacher: Tensor, rejected_teacher: Tensor
) -> tuple[Tensor, Tensor]:
    shapes = {tuple(x.shape) for x in (chosen_student, rejected_student, chosen_teacher, rejected_teacher)}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise ValueError(
            f"log-probabilities of shapes {sorted(shapes)}; all four must be [B], one sum a sequence"
        )
    chosen = exact(chosen_student) - exact(chosen_teacher.detach())  # [B]
    rejected = exact(rejected_student) - exact(rejected_teacher.detach())  # [B]
    return chosen, rejected
