"""What a step's attention can be made of: two matrix products in torch, and a kernel that reads keys in parts."""

import torch
from torch import Tensor

from microglia.execution.captured import kernels
from microglia.units.kv import take_rows


def by_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """q (B, H, 1, D), k and v (B, G, T, D), mask (B, 1, 1, T) to be added → (B, 1, H, D); the softmax in float32.

    Groups outermost, as the cache stores them: in any other order products would copy keys and values first.
    """
    grouped = query.squeeze(2).unflatten(1, (key.shape[1], -1)).transpose(0, 1)  # (G, B, H/G, D)
    key, value = key.transpose(0, 1), value.transpose(0, 1)
    scores = (grouped @ key.transpose(-1, -2)).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask[:, 0]
    output: Tensor = (scores.softmax(-1).to(value.dtype) @ value).transpose(0, 1).flatten(1, 2)[:, None]
    return output


@torch.library.custom_op("microglia::attend_in_parts", mutates_args=())
def by_kernel(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    position: Tensor,
    own: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """q (B, H, 1, D), keys and values as stored (g, B, T, D), mask (B, 1, 1, T) to be added → (B, 1, H, D).

    position: (1,), of the present token: no key behind it is read. own: (B, g·q), the query heads of each row in the
    order of its groups, -1 for none; heads that a row has not are zero. None where all rows have all heads.
    softcap: 0 for none. One operation to a compiler and to a tape.
    """
    if kernels.usable(query.device):
        from microglia.execution.captured.kernels.attention import attend  # Triton may be missing

        query = query if query.stride(-1) == 1 else query.contiguous()
        return attend(query, keys, values, mask, position, own, scale, softcap)
    key, value = keys.transpose(0, 1), values.transpose(0, 1)
    cap = softcap or None
    if own is None:
        return by_products(query, key, value, mask, scale=scale, softcap=cap).contiguous()
    heads, kept = own.clamp(min=0), own >= 0
    output = by_products(take_rows(query, heads), key, value, mask, scale=scale, softcap=cap)
    output = output.masked_fill(~kept[:, None, :, None], 0)
    whole = output.new_zeros(query.shape[0], 1, query.shape[1], query.shape[3])
    return whole.scatter_add(2, heads[:, None, :, None].expand_as(output), output)


@by_kernel.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], query.shape[3])
