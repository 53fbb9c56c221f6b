"""What attention over codes is, written out once more in float64: what every backend is held to."""

import torch

from transformers_commvq.ops import decode
from transformers_commvq.ops.attention_reference import attention_reference


def definition(query, past, mask, scaling, softcap=None, sink_logits=None):
    """Attention over a compressed past in float64, one row at a time; what ops.attention returns.

    sink_logits: (heads,), one more logit in each softmax with nothing behind it (GPT-OSS), or None.
    """
    cos, sin = past.positions.tables(0, past.length, torch.device("cpu"))
    keys = past.rope.rotate(decode(past.keys, past.book.keys), cos[:, None], sin[:, None]).double()
    values = decode(past.values, past.book.values).double()
    out = torch.zeros(query.shape, dtype=torch.float64)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=torch.float64)
    group = query.shape[1] // keys.shape[1]
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for i in range(query.shape[2]):
                score = keys[b, h // group] @ query[b, h, i].double() * scaling
                score = score if softcap is None else torch.tanh(score / softcap) * softcap
                if mask is not None:
                    row = mask[min(b, mask.shape[0] - 1), 0, min(i, mask.shape[2] - 1), : past.length]
                    score = score.masked_fill(~row, -torch.inf) if row.dtype == torch.bool else score + row
                if past.hidden is not None:
                    lo, hi = past.hidden[b].tolist()
                    score[lo:hi] = -torch.inf
                if sink_logits is not None:
                    score = torch.cat([score, sink_logits[h : h + 1].double()])
                if (score > -torch.inf).any():
                    out[b, h, i] = score.softmax(0)[: past.length] @ values[b, h // group]
                    lse[b, h, i] = score.logsumexp(0)
    return out, lse


def check_attention(attend, past, group, queries, tolerance, dtype=torch.float32, mask=None, softcap=None, spread=1.0):
    """A backend against the reference on random queries: relative error of the output, absolute of the log-sum-exp.

    attend: as ops.attention. group: query heads of a KV head. spread: standard deviation of the queries.
    """
    batch, dim = past.keys.shape[0], past.book.keys.head_dim
    g = torch.Generator().manual_seed(5)
    query = (torch.randn(batch, past.heads * group, queries, dim, generator=g) * spread).to(dtype)
    want, want_lse = attention_reference(query, past, mask, dim**-0.5, softcap)
    out, lse = attend(query, past, mask, dim**-0.5, softcap)
    assert out.dtype == lse.dtype == torch.float32 and out.shape == want.shape and lse.shape == want_lse.shape
    hidden = want_lse == -torch.inf
    assert torch.equal(hidden, lse == -torch.inf)
    assert not out[hidden].any() and not out.isnan().any()
    assert (out - want).norm() <= tolerance * want.norm()
    assert (lse - want_lse)[~hidden].abs().max() <= 4 * tolerance
