"""What attention over codes is, written out once more in float64: what every backend is held to."""

import torch

from transformers_commvq.ops import decode


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
