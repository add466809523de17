"""A small GPT in plain NumPy and float64, forward and hand-written backward: the tests' reference.

It shares with gpt3jax only the names and layouts of the weights: a flat dict, blocks stacked over
the layers, tied head, `V` the padded vocabulary. It imports neither gpt3jax nor JAX nor torch;
`test_numpy_gpt.py` holds it against finite differences, Megatron and Hugging Face.

Each part returns its output and `backward`, which takes the gradient of the output to that of its
input and a dict of those of its weights. A name that starts with `d` is a gradient of the loss.
"""

import itertools
import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "golden"

# ours: (Megatron-Core's, Hugging Face's)
NAMES = {
    "embedding_VD": ("embedding.word_embeddings.weight", "wte.weight"),
    "positions_TD": ("embedding.position_embeddings.weight", "wpe.weight"),
    "norm_scale_D": ("decoder.final_layernorm.weight", "ln_f.weight"),
    "norm_bias_D": ("decoder.final_layernorm.bias", "ln_f.bias"),
}
BLOCK_NAMES = {
    "norm_1_scale_LD": ("input_layernorm.weight", "ln_1.weight"),
    "norm_1_bias_LD": ("input_layernorm.bias", "ln_1.bias"),
    "w_qkv_LD3HK": ("self_attention.linear_qkv.weight", "attn.c_attn.weight"),
    "b_qkv_L3HK": ("self_attention.linear_qkv.bias", "attn.c_attn.bias"),
    "w_out_LHKD": ("self_attention.linear_proj.weight", "attn.c_proj.weight"),
    "b_out_LD": ("self_attention.linear_proj.bias", "attn.c_proj.bias"),
    "norm_2_scale_LD": ("pre_mlp_layernorm.weight", "ln_2.weight"),
    "norm_2_bias_LD": ("pre_mlp_layernorm.bias", "ln_2.bias"),
    "w_in_LDF": ("mlp.linear_fc1.weight", "mlp.c_fc.weight"),
    "b_in_LF": ("mlp.linear_fc1.bias", "mlp.c_fc.bias"),
    "w_down_LFD": ("mlp.linear_fc2.weight", "mlp.c_proj.weight"),
    "b_down_LD": ("mlp.linear_fc2.bias", "mlp.c_proj.bias"),
}


def _einsum(subscripts, *arrays):
    return np.einsum(subscripts, *arrays, optimize=True)


def _norm(w, name, x_BTD, eps):
    scale_D = w[f"{name}_scale_D"]
    centred_BTD = x_BTD - x_BTD.mean(-1, keepdims=True)
    inverse_BT1 = 1 / np.sqrt((centred_BTD**2).mean(-1, keepdims=True) + eps)
    unit_BTD = centred_BTD * inverse_BT1

    def backward(dy_BTD):
        dunit_BTD = dy_BTD * scale_D
        along_BTD = unit_BTD * (dunit_BTD * unit_BTD).mean(-1, keepdims=True)
        dx_BTD = inverse_BT1 * (dunit_BTD - dunit_BTD.mean(-1, keepdims=True) - along_BTD)
        dscale_D, dbias_D = (dy_BTD * unit_BTD).sum((0, 1)), dy_BTD.sum((0, 1))
        return dx_BTD, {f"{name}_scale_D": dscale_D, f"{name}_bias_D": dbias_D}

    return unit_BTD * scale_D + w[f"{name}_bias_D"], backward


def _attention(w, x_BTD, allowed_BTS):
    qkv_3BTHK = _einsum("btd,dchk->cbthk", x_BTD, w["w_qkv_D3HK"])
    q_BTHK, k_BSHK, v_BSHK = qkv_3BTHK + w["b_qkv_3HK"][:, None, None]
    scale = q_BTHK.shape[-1] ** -0.5
    scores_BHTS = _einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) * scale
    scores_BHTS = np.where(allowed_BTS[:, None], scores_BHTS, -np.inf)
    probs_BHTS = np.exp(scores_BHTS - scores_BHTS.max(-1, keepdims=True))
    probs_BHTS /= probs_BHTS.sum(-1, keepdims=True)
    mixed_BTHK = _einsum("bhts,bshk->bthk", probs_BHTS, v_BSHK)

    def backward(dy_BTD):
        dmixed_BTHK = _einsum("btd,hkd->bthk", dy_BTD, w["w_out_HKD"])
        dprobs_BHTS = _einsum("bthk,bshk->bhts", dmixed_BTHK, v_BSHK)
        inner_BHT1 = (dprobs_BHTS * probs_BHTS).sum(-1, keepdims=True)
        dscores_BHTS = probs_BHTS * (dprobs_BHTS - inner_BHT1) * scale
        dq_BTHK = _einsum("bhts,bshk->bthk", dscores_BHTS, k_BSHK)
        dk_BSHK = _einsum("bhts,bthk->bshk", dscores_BHTS, q_BTHK)
        dv_BSHK = _einsum("bhts,bthk->bshk", probs_BHTS, dmixed_BTHK)
        dqkv_3BTHK = np.stack([dq_BTHK, dk_BSHK, dv_BSHK])
        return _einsum("cbthk,dchk->btd", dqkv_3BTHK, w["w_qkv_D3HK"]), {
            "w_qkv_D3HK": _einsum("btd,cbthk->dchk", x_BTD, dqkv_3BTHK),
            "b_qkv_3HK": dqkv_3BTHK.sum((1, 2)),
            "w_out_HKD": _einsum("bthk,btd->hkd", mixed_BTHK, dy_BTD),
            "b_out_D": dy_BTD.sum((0, 1)),
        }

    return _einsum("bthk,hkd->btd", mixed_BTHK, w["w_out_HKD"]) + w["b_out_D"], backward


def _gelu(x_BTF, kind):
    """Return GELU and its derivative: `tanh` (GPT-2, Megatron's default) or exact `erf`."""
    if kind == "erf":
        cdf_BTF = 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(x_BTF / math.sqrt(2)))
        density_BTF = np.exp(-0.5 * x_BTF**2) / math.sqrt(2 * math.pi)
    elif kind == "tanh":
        c = math.sqrt(2 / math.pi)
        tanh_BTF = np.tanh(c * (x_BTF + 0.044715 * x_BTF * x_BTF**2))
        cdf_BTF = 0.5 * (1 + tanh_BTF)
        density_BTF = 0.5 * (1 - tanh_BTF**2) * c * (1 + 3 * 0.044715 * x_BTF**2)
    else:
        raise ValueError(f"gelu={kind!r}: use 'tanh' or 'erf'")
    return x_BTF * cdf_BTF, cdf_BTF + x_BTF * density_BTF


def _mlp(w, x_BTD, gelu):
    hidden_BTF, slope_BTF = _gelu(_einsum("btd,df->btf", x_BTD, w["w_in_DF"]) + w["b_in_F"], gelu)

    def backward(dy_BTD):
        dhidden_BTF = _einsum("btd,fd->btf", dy_BTD, w["w_down_FD"]) * slope_BTF
        return _einsum("btf,df->btd", dhidden_BTF, w["w_in_DF"]), {
            "w_in_DF": _einsum("btd,btf->df", x_BTD, dhidden_BTF),
            "b_in_F": dhidden_BTF.sum((0, 1)),
            "w_down_FD": _einsum("btf,btd->fd", hidden_BTF, dy_BTD),
            "b_down_D": dy_BTD.sum((0, 1)),
        }

    return _einsum("btf,fd->btd", hidden_BTF, w["w_down_FD"]) + w["b_down_D"], backward


def _block(w, x_BTD, allowed_BTS, gelu, eps):
    y_BTD, norm_1 = _norm(w, "norm_1", x_BTD, eps)
    y_BTD, attention = _attention(w, y_BTD, allowed_BTS)
    x_BTD = x_BTD + y_BTD
    y_BTD, norm_2 = _norm(w, "norm_2", x_BTD, eps)
    y_BTD, mlp = _mlp(w, y_BTD, gelu)

    def backward(dx_BTD):
        grads = {}
        for residual_branch in [(mlp, norm_2), (attention, norm_1)]:
            dy_BTD = dx_BTD
            for part in residual_branch:
                dy_BTD, part_grads = part(dy_BTD)
                grads |= part_grads
            dx_BTD = dx_BTD + dy_BTD
        return dx_BTD, grads

    return x_BTD + y_BTD, backward


def _cross_entropy(logits_BTV, targets_BT, loss_mask_BT):
    """Return the mean loss over the mask, the loss of each token, and the logits' gradient."""
    top_BT1 = logits_BTV.max(-1, keepdims=True)
    log_sum_BT1 = top_BT1 + np.log(np.exp(logits_BTV - top_BT1).sum(-1, keepdims=True))
    targets_BT1 = targets_BT[..., None]
    token_loss_BT = (log_sum_BT1 - np.take_along_axis(logits_BTV, targets_BT1, -1))[..., 0]
    one_hot_BTV = np.arange(logits_BTV.shape[-1]) == targets_BT1
    share_BT = loss_mask_BT / loss_mask_BT.sum()
    dlogits_BTV = (np.exp(logits_BTV - log_sum_BT1) - one_hot_BTV) * share_BT[..., None]
    return (token_loss_BT * share_BT).sum(), token_loss_BT, dlogits_BTV


def loss_and_grads(
    weights,
    tokens_BT,
    targets_BT,
    loss_mask_BT=None,
    positions_BT=None,
    allowed_BTS=None,
    *,
    gelu="tanh",
    vocab_size=None,
    layer_windows=None,
    eps=1e-5,
):
    """Return (loss, logits_BTV, token_loss_BT, grads), all float64; loss is the mean over the mask.

    `allowed_BTS` (True: may attend) need not be causal: causality and the windows are always added.
    `layer_windows`: for each layer None, or how many earlier positions a query sees beside itself.
    `vocab_size`: logits from there on are -inf; None leaves the padding in, as Megatron does.
    """
    weights = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    n_layers, seq_len = len(weights["blocks/b_out_LD"]), tokens_BT.shape[1]
    mask_BT = np.ones(tokens_BT.shape) if loss_mask_BT is None else np.float64(loss_mask_BT)
    if positions_BT is None:
        positions_BT = np.broadcast_to(np.arange(seq_len), tokens_BT.shape)
    age_TS = np.arange(seq_len)[:, None] - np.arange(seq_len)
    allowed_BTS = (age_TS >= 0) & (True if allowed_BTS is None else allowed_BTS)
    allowed_BTS = np.broadcast_to(allowed_BTS, (len(tokens_BT), seq_len, seq_len))
    # "blocks/w_in_LDF" of all layers -> "w_in_DF" of one
    short = {name: name[7:].replace("_L", "_") for name in weights if name.startswith("blocks/")}

    x_BTD = weights["embedding_VD"][tokens_BT] + weights["positions_TD"][positions_BT]
    backwards = []
    for i, window in zip(range(n_layers), layer_windows or [None] * n_layers, strict=True):
        seen_BTS = allowed_BTS if window is None else allowed_BTS & (age_TS <= window)
        w = {short[name]: weights[name][i] for name in short}
        x_BTD, backward = _block(w, x_BTD, seen_BTS, gelu, eps)
        backwards.append(backward)
    x_BTD, final_norm = _norm(weights, "norm", x_BTD, eps)
    logits_BTV = _einsum("btd,vd->btv", x_BTD, weights["embedding_VD"])
    if vocab_size is not None:
        logits_BTV[..., vocab_size:] = -np.inf
    loss, token_loss_BT, dlogits_BTV = _cross_entropy(logits_BTV, targets_BT, mask_BT)

    grads = {name: np.zeros_like(array) for name, array in weights.items()}
    grads["embedding_VD"] += _einsum("btv,btd->vd", dlogits_BTV, x_BTD)
    dx_BTD = _einsum("btv,vd->btd", dlogits_BTV, weights["embedding_VD"])
    dx_BTD, norm_grads = final_norm(dx_BTD)
    grads |= norm_grads
    for i in reversed(range(n_layers)):
        dx_BTD, block_grads = backwards[i](dx_BTD)
        for name in short:
            grads[name][i] = block_grads[short[name]]
    np.add.at(grads["embedding_VD"], tokens_BT, dx_BTD)
    np.add.at(grads["positions_TD"], positions_BT, dx_BTD)
    return loss, logits_BTV, token_loss_BT, grads


def adamw_step(
    weights, grads, state, lr, *, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0
):
    """Return (weights, state, grad_norm before clipping) after a step; `state` is None at first.

    As Megatron: matrices and both embeddings decay, biases and LayerNorm do not.
    """
    count, mean, square = state or (0, dict.fromkeys(weights, 0.0), dict.fromkeys(weights, 0.0))
    count += 1
    grad_norm = math.sqrt(sum((grad**2).sum() for grad in grads.values()))
    clip_scale = min(1.0, clip / (grad_norm + 1e-6))
    grads = {n: grad * clip_scale for n, grad in grads.items()}
    mean = {n: beta1 * mean[n] + (1 - beta1) * grads[n] for n in weights}
    square = {n: beta2 * square[n] + (1 - beta2) * grads[n] ** 2 for n in weights}
    updated = {}
    for n, weight in weights.items():
        decays = n.split("/")[-1].startswith(("w_", "embedding_", "positions_"))
        step = mean[n] / (1 - beta1**count) / (np.sqrt(square[n] / (1 - beta2**count)) + eps)
        updated[n] = weight - lr * step - lr * weight_decay * decays * weight
    return updated, (count, mean, square), grad_norm


def _from_in_out(tensors, n_heads, column, layer_prefix):
    """Return our weights from tensors that are in x out, with qkv [q of all heads, k, v]."""
    weights = {name: np.float64(tensors[theirs[column]]) for name, theirs in NAMES.items()}
    for name, theirs in BLOCK_NAMES.items():
        keys = (layer_prefix.format(i) + theirs[column] for i in itertools.count())
        keys = itertools.takewhile(tensors.__contains__, keys)
        array_L = np.stack([np.float64(tensors[key]) for key in keys])
        if "qkv" in name:
            array_L = array_L.reshape(*array_L.shape[:-1], 3, n_heads, -1)
        if "w_out" in name:
            array_L = array_L.reshape(len(array_L), n_heads, -1, array_L.shape[-1])
        weights[f"blocks/{name}"] = array_L
    return weights


def from_megatron(tensors, n_heads):
    """Return our weights (or gradients) from Megatron-Core's: out x in, qkv head by head."""
    in_out = dict(tensors)
    for name, tensor in tensors.items():
        if "linear_qkv" in name:
            by_head = tensor.reshape(n_heads, 3, -1, *tensor.shape[1:])
            tensor = by_head.swapaxes(0, 1).reshape(tensor.shape)
        if "linear" in name:
            in_out[name] = tensor.T
    return _from_in_out(in_out, n_heads, 0, "decoder.layers.{}.")


def from_hf(tensors, n_heads, padded_vocab):
    """Return our weights (or gradients) from Hugging Face GPT-2's, with zero rows as padding."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    n_padding = padded_vocab - len(tensors["wte.weight"])
    tensors["wte.weight"] = np.pad(tensors["wte.weight"], ((0, n_padding), (0, 0)))
    return _from_in_out(tensors, n_heads, 1, "h.{}.")


def load_megatron(variant):
    """Return (weights, arguments of `loss_and_grads`, its golden results by name)."""
    folder = GOLDEN / "megatron_gpt"
    n_heads = json.loads((folder / "model.json").read_text())["shape"]["heads"]
    batch = np.load(folder / "batch.npz")
    inputs = {"tokens_BT": batch["tokens"], "targets_BT": batch["labels"]}
    inputs |= {
        "tanh": {},
        "erf": {"gelu": "erf"},
        "window": {"layer_windows": [8, None, 8]},
        "reset": {
            "loss_mask_BT": batch["reset.loss_mask"],
            "positions_BT": batch["reset.position_ids"],
            "allowed_BTS": ~batch["reset.attention_mask"],
        },
    }[variant]
    names = {"loss": "loss", "logits_BTV": "logits", "token_loss_BT": "token_loss"}
    expected = {ours: batch[f"{variant}.{theirs}"] for ours, theirs in names.items()}
    grads = load_file(folder / f"grads_{variant}.safetensors")
    expected["grads"] = from_megatron(grads, n_heads)
    return from_megatron(load_file(folder / "weights.safetensors"), n_heads), inputs, expected


def load_hf(padded_vocab):
    """Return (weights, arguments of `loss_and_grads`, its golden results; logits are unpadded)."""
    folder = GOLDEN / "hf_gpt2"
    config = json.loads((folder / "config.json").read_text())
    golden = np.load(folder / "golden.npz")
    tokens_BT, loss_mask_BT = golden["input_ids"], np.ones(golden["input_ids"].shape)
    loss_mask_BT[:, -1] = 0  # the last token has no next one
    inputs = {"tokens_BT": tokens_BT, "targets_BT": np.roll(tokens_BT, -1, axis=1)}
    inputs |= {"loss_mask_BT": loss_mask_BT, "vocab_size": config["vocab_size"]}
    grads = {n.removeprefix("grad."): golden[n] for n in golden if n.startswith("grad.")}
    expected = {"loss": golden["loss"], "logits_BTV": golden["logits"]}
    expected["grads"] = from_hf(grads, config["n_head"], padded_vocab)
    weights = load_file(folder / "model.safetensors")
    return from_hf(weights, config["n_head"], padded_vocab), inputs, expected


def load_curve():
    """Return (initial weights, final weights, configuration, tokens and values of each step)."""
    folder = GOLDEN / "megatron_curve"
    config = json.loads((folder / "curve.json").read_text())["config"]
    initial, final = (
        from_megatron(load_file(folder / f"{name}.safetensors"), config["shape"]["heads"])
        for name in ("initial", "final")
    )
    return initial, final, config, dict(np.load(folder / "curve.npz"))


def relative_errors(actual, expected):
    """Return each tensor's |actual - expected| / |expected|, without the key third of `b_qkv`.

    A key bias shifts all scores of a query alike: its true gradient is zero, the rest is rounding.
    """
    errors = {}
    for name, right in expected.items():
        wrong = np.asarray(actual[name], np.float64) - right
        if "b_qkv" in name:
            wrong, right = wrong[:, ::2], right[:, ::2]
        errors[name] = np.linalg.norm(wrong) / np.linalg.norm(right)
    return errors


def assert_close(actual, expected, tolerance=1e-5):
    """Compare arrays by name."""
    for name, error in relative_errors(actual, expected).items():
        assert error < tolerance, f"{name}: {error:.1e}"
