"""RDist: match how the visual tokens of an image relate to each other (LLaVA-KD, arXiv 2410.16236).

The relation of a model is the Gram matrix `Y Yᵀ` of its representations of the N visual tokens; the loss is
one minus the cosine of the two flattened matrices. LLaVA-KD's code takes the raw logits as Y, which
`relation_from_hidden` does without forming them. Images of equal token counts can share a call, each with a loss of its own;
the mean over images is the caller's (the released code flattens a whole batch instead, so that images with large logits
dominate).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mmkd.losses.numerics import exact, result_dtype

SOURCES = ("logits", "hidden")


def relation(student: Tensor, teacher: Tensor) -> Tensor:
    """`1 - <R_s, R_t> / (|R_s| |R_t|)` with `R = Y Yᵀ`, for one image or each of several.

    student `[..., N, *]`, teacher `[..., N, *]`: rows of the same N visual tokens; their widths may differ. Returns `[...]`. No centring, no normalisation of rows (as LLaVA-KD's code). Scaling either side changes nothing.
    Raises ValueError when the numbers of rows differ.
    """
    _check_rows(student, teacher)
    a, b = exact(student), exact(teacher)  # [..., N, Ds], [..., N, Dt]
    with _full_precision(student):
        return _distance(a @ a.mT, b @ b.mT).to(result_dtype(student, teacher))


def relation_from_hidden(
    student: Tensor, student_gram: Tensor | None, teacher: Tensor, teacher_gram: Tensor | None, source: str = "logits"
) -> Tensor:
    """`relation` of the logits `Y = H Wᵀ`, without the logits: `Y Yᵀ = H (Wᵀ W) Hᵀ`.

    student `[..., N, Ds]`, teacher `[..., N, Dt]`: last hidden states at the visual tokens; the Gram matrices `[D, D]`
    are `head_gram` of each head. If a Gram matrix is `[D + 1, D + 1]`, the head has a bias and a column of
    ones is appended to the hidden states. A factor on the logits changes nothing; a softcap is not linear and
    has no such form. source: "logits" (LLaVA-KD's code), or "hidden" for the hidden states themselves, without
    Gram matrices of heads. Returns `[...]`. Our identity; the loss is LLaVA-KD's.
    """
    if source not in SOURCES:
        raise ValueError(f"source is {source!r}; it must be one of {', '.join(SOURCES)}")
    _check_rows(student, teacher)
    if source == "hidden":
        return relation(student, teacher)
    with _full_precision(student):
        relations = _gram_of_logits(student, student_gram), _gram_of_logits(teacher, teacher_gram)  # [..., N, N] each
        return _distance(*relations).to(result_dtype(student, teacher))


def head_gram(weight: Tensor, bias: Tensor | None = None, block: int = 16384) -> Tensor:
    """`Wᵀ W` `[D, D]` of a head `[V, D]`, with the bias `[V]` as one more column of W: `[D + 1, D + 1]`.

    For a frozen head this is done once. Blocks of the vocabulary are summed in float32 (float64 stays) or
    better, so that a bfloat16 head is never copied whole, in backward neither. Differentiable once.
    """
    with _full_precision(weight):
        return _HeadGram.apply(weight, bias, block)


class _HeadGram(torch.autograd.Function):
    """The gradient at W is `W (G + Gᵀ)`: one product a block, where the chain rule through `Wᵀ W` takes two and keeps one."""

    @staticmethod
    def forward(ctx, weight, bias, block):
        ctx.save_for_backward(weight, bias)
        ctx.block = block
        return sum(part.T @ part for part in _blocks(weight, bias, block))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        weight, bias = ctx.saved_tensors
        both = gradient + gradient.T  # [D, D], with a bias [D + 1, D + 1]
        back = [(part @ both).to(weight.dtype) for part in _blocks(weight, bias, ctx.block)]  # [b, D] or [b, D + 1] each
        back = torch.cat(back)
        return (back, None, None) if bias is None else (back[:, :-1], back[:, -1].to(bias.dtype), None)


def _blocks(weight: Tensor, bias: Tensor | None, size: int) -> Iterator[Tensor]:
    """Rows of the head in the precision of the sum, with the bias as one more column. [b, D] or [b, D + 1]"""
    for start in range(0, weight.shape[0], size):
        part = _rows(weight[start : start + size])  # [b, D]
        if bias is not None:
            part = torch.cat([part, _rows(bias[start : start + size]).unsqueeze(-1)], dim=-1)  # [b, D + 1]
        yield part


def _full_precision(x: Tensor) -> torch.autocast:
    """Products as precise as their factors, autocast or not."""
    return torch.autocast(x.device.type, enabled=False)


def _rows(x: Tensor) -> Tensor:
    return x.to(result_dtype(x))


def _check_rows(student: Tensor, teacher: Tensor) -> None:
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"{student.shape[-2]} visual tokens of the student and {teacher.shape[-2]} of the teacher; the "
            "relation compares them one by one: use encoders with equal token counts, or bring one side to "
            "the other's grid"
        )


def _gram_of_logits(hidden: Tensor, gram: Tensor) -> Tensor:
    hidden = _rows(hidden).to(torch.promote_types(_rows(hidden).dtype, gram.dtype))  # [..., N, D]
    if gram.shape[0] == hidden.shape[-1] + 1:
        hidden = torch.nn.functional.pad(hidden, (0, 1), value=1.0)  # [..., N, D + 1]
    if gram.shape[0] != hidden.shape[-1]:
        raise ValueError(
            f"hidden states {tuple(hidden.shape)} do not fit a Gram matrix {tuple(gram.shape)}; "
            "it must be head_gram(weight, bias) of the same model's head"
        )
    return hidden @ gram.to(hidden.dtype) @ hidden.mT  # [..., N, N]


def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    # 1 - cos(a, b) = |a/|a| - b/|b||² / 2: no difference of nearly equal numbers when the two agree well.
    a, b = _unit(exact(student)), _unit(exact(teacher))  # [..., N, N] each
    return (a - b).square().sum((-2, -1)) / 2


def _unit(x: Tensor) -> Tensor:
    size = torch.linalg.matrix_norm(x, keepdim=True)
    return x / size.where(size > 0, torch.ones_like(size))
