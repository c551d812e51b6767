"""Triton kernels of the causal convolution and of its gradients.

The definition is `reference.causal_conv`. For one channel, w_k the weight of the input k tokens back (column W − 1 − k)
and [t, s] one where two tokens are of one document, or else, and outside the row, zero:

    p_t = bias + Σ_k w_k [t, t−k] x_{t−k}        y_t = p_t, or p_t σ(p_t)

    g_t = ∂y_t, or ∂y_t σ(p_t) (1 + p_t (1 − σ(p_t)))        ∂bias = Σ_t g_t
    ∂x_s = Σ_k w_k [s+k, s] g_{s+k}                          ∂w_k = Σ_t g_t [t, t−k] x_{t−k}

A thread has its own channels and goes from token to token: the last W − 1 inputs, and in backward the sums ∂x of W − 1
tokens to which later ones still add, stay in registers. So but for a program's edges every number is read once and g is
computed once. A program's own sums over its tokens are added up afterwards in a fixed order: two runs give the same
bits.
"""

# Jitted code grows tuples, which Python's types do not say.
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_ext.layout import document_strides, rows_contiguous

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_WIDTH = 8  # W above; taps and sums are registers
MULTIPROCESSORS = 132


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels serve this type and width."""
    return x.dtype in DTYPES and weight.shape[1] <= LARGEST_WIDTH


def launch_config(op: str, batch: int, length: int, channels: int) -> dict:
    """Of a program of "forward" or "backward": BLOCK_C channels, STEPS tokens that are loaded before any is computed
    and, in backward, BLOCK_T tokens.

    Two channels a thread share what is computed per token; more STEPS would leave registers for fewer programs. Longer
    programs leave fewer partial sums, but four a multiprocessor keep it busy.
    """
    config = {"BLOCK_C": 256, "num_warps": 4}
    if op == "forward":
        return config | {"STEPS": 16}
    tokens, across = 128, batch * triton.cdiv(channels, config["BLOCK_C"])
    while tokens > 32 and across * triton.cdiv(length, tokens) < 4 * MULTIPROCESSORS:
        tokens //= 2
    return config | {"STEPS": 4, "BLOCK_T": tokens}


@triton.jit
def _taps(weight_ptr, c, in_c, stride, W: tl.constexpr):
    """W weights (BLOCK_C,), the one of the farthest token first."""
    taps: tl.tuple = ()
    for k in tl.static_range(W):
        taps += (tl.load(weight_ptr + c * stride + k, mask=in_c, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _tokens(base, token, stride, length, c, in_c, BEFORE: tl.constexpr, AFTER: tl.constexpr):
    """Numbers (BLOCK_C,) of BEFORE tokens that precede `token` and AFTER from it on; zeros outside the row."""
    rows: tl.tuple = ()
    token -= BEFORE
    base += token.to(tl.int64) * stride
    for i in tl.static_range(BEFORE + AFTER):
        inside = token + i >= 0 if i < BEFORE else token + i < length
        rows += (tl.load(base + i * stride + c, mask=in_c & inside, other=0.0),)
    return rows


@triton.jit
def _documents(base, token, stride, length, BEFORE: tl.constexpr, AFTER: tl.constexpr, HAS_SEQ_IDX: tl.constexpr):
    """Documents of the same tokens, one and the same if no seq_idx is given."""
    documents: tl.tuple = ()
    token -= BEFORE
    for i in tl.static_range(BEFORE + AFTER):
        if HAS_SEQ_IDX:
            inside = token + i >= 0 if i < BEFORE else token + i < length
            documents += (tl.load(base + (token + i).to(tl.int64) * stride, mask=inside, other=0),)
        else:
            documents += (tl.full((), 0, tl.int32),)
    return documents


@triton.jit
def _of_document(value, one, other, HAS_SEQ_IDX: tl.constexpr):
    """value in float32, zeros where the two documents differ."""
    value = value.to(tl.float32)
    if HAS_SEQ_IDX:
        value = tl.where(one == other, value, 0.0)
    return value


@triton.jit(do_not_specialize=["length"])
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    seq_idx_ptr,
    y_ptr,
    length,
    channels,
    stride_x_batch,
    stride_x_token,
    stride_weight,
    stride_seq_idx_batch,
    stride_seq_idx_token,
    W: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SEQ_IDX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Grid (blocks of channels, blocks of STEPS tokens, B). y (B, L, C)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    token = tl.program_id(1) * STEPS
    row = tl.program_id(2).to(tl.int64)
    seq_idx_base = seq_idx_ptr
    if HAS_SEQ_IDX:
        seq_idx_base += row * stride_seq_idx_batch
    # All is loaded before the first store, which a load would not overtake.
    x = _tokens(x_ptr + row * stride_x_batch, token, stride_x_token, length, c, in_c, W - 1, STEPS)
    document = _documents(seq_idx_base, token, stride_seq_idx_token, length, W - 1, STEPS, HAS_SEQ_IDX)
    taps = _taps(weight_ptr, c, in_c, stride_weight, W)
    bias = tl.zeros([BLOCK_C], dtype=tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    y_base = y_ptr + (row * length + token) * channels
    for i in tl.static_range(STEPS):
        y = bias
        for k in tl.static_range(W):
            y += taps[k] * _of_document(x[i + k], document[i + k], document[i + W - 1], HAS_SEQ_IDX)
        if SILU:
            y *= tl.sigmoid(y)
        tl.store(y_base + i * channels + c, y.to(y_ptr.dtype.element_ty), mask=in_c & (token + i < length))


@triton.jit
def _walk(
    before,
    documents_before,
    pending,
    d_taps,
    d_bias,
    taps,
    bias,
    x_base,
    dy_base,
    seq_idx_base,
    dx_base,
    token,
    first,
    length,
    channels,
    c,
    in_c,
    stride_x,
    stride_dy,
    stride_seq_idx,
    W: tl.constexpr,
    SILU: tl.constexpr,
    HAS_SEQ_IDX: tl.constexpr,
    STEPS: tl.constexpr,
    OWN: tl.constexpr,
):
    """STEPS tokens from `token` on, whose ∂weight and ∂bias are this program's if OWN.

    before and documents_before are of the W − 1 tokens that precede them, pending are these tokens' ∂x as far as they
    are summed; all move on. ∂x of tokens from `first` on is written once it is complete.
    """
    x = before + _tokens(x_base, token, stride_x, length, c, in_c, 0, STEPS)
    document = documents_before + _documents(seq_idx_base, token, stride_seq_idx, length, 0, STEPS, HAS_SEQ_IDX)
    dx_base += (token.to(tl.int64) - (W - 1)) * channels
    dy = _tokens(dy_base, token, stride_dy, length, c, in_c, 0, STEPS)
    for i in tl.static_range(STEPS):
        g = dy[i].to(tl.float32)
        if SILU:
            p = bias
            for k in tl.static_range(W):
                p += taps[k] * _of_document(x[i + k], document[i + k], document[i + W - 1], HAS_SEQ_IDX)
            gate = tl.sigmoid(p)
            g *= gate * (1.0 + p * (1.0 - gate))
        sums: tl.tuple = ()
        summed: tl.tuple = ()
        for k in tl.static_range(W):
            reaching = _of_document(g, document[i + k], document[i + W - 1], HAS_SEQ_IDX)
            if k < W - 1:
                sums += (pending[k] + taps[k] * reaching,)
            else:
                sums += (taps[k] * reaching,)
            if OWN:
                summed += (d_taps[k] + reaching * x[i + k].to(tl.float32),)
        if OWN:
            d_taps = summed
            d_bias += g
        complete = token + i - (W - 1)
        written = in_c & (complete >= first) & (complete < length)
        tl.store(dx_base + i * channels + c, sums[0].to(dx_base.dtype.element_ty), mask=written)
        pending = sums[1:]
    return x[STEPS:], document[STEPS:], pending, d_taps, d_bias


@triton.jit(do_not_specialize=["length"])
def _backward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    seq_idx_ptr,
    dy_ptr,
    dx_ptr,
    partial_ptr,
    length,
    channels,
    stride_x_batch,
    stride_x_token,
    stride_dy_batch,
    stride_dy_token,
    stride_weight,
    stride_seq_idx_batch,
    stride_seq_idx_token,
    W: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SEQ_IDX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Grid (blocks of channels, blocks of BLOCK_T tokens, B). dx (B, L, C); partial (B, blocks of tokens, W + 1, C):
    what each program adds to ∂weight and, the last, to ∂bias."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    block = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    first = block * BLOCK_T
    x_base = x_ptr + row * stride_x_batch
    dy_base = dy_ptr + row * stride_dy_batch
    dx_base = dx_ptr + row * length * channels
    seq_idx_base = seq_idx_ptr
    if HAS_SEQ_IDX:
        seq_idx_base += row * stride_seq_idx_batch
    taps = _taps(weight_ptr, c, in_c, stride_weight, W)
    zeros = tl.zeros([BLOCK_C], dtype=tl.float32)
    bias = zeros
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c, mask=in_c, other=0.0).to(tl.float32)

    before = _tokens(x_base, first, stride_x_token, length, c, in_c, W - 1, 0)
    documents = _documents(seq_idx_base, first, stride_seq_idx_token, length, W - 1, 0, HAS_SEQ_IDX)
    pending = (zeros,) * (W - 1)
    d_taps = (zeros,) * W
    d_bias = zeros
    for start in range(0, BLOCK_T, STEPS):
        before, documents, pending, d_taps, d_bias = _walk(
            before,
            documents,
            pending,
            d_taps,
            d_bias,
            taps,
            bias,
            x_base,
            dy_base,
            seq_idx_base,
            dx_base,
            first + start,
            first,
            length,
            channels,
            c,
            in_c,
            stride_x_token,
            stride_dy_token,
            stride_seq_idx_token,
            W,
            SILU,
            HAS_SEQ_IDX,
            STEPS,
            True,
        )
    _walk(  # the tokens after the block that its last W − 1 reach
        before,
        documents,
        pending,
        d_taps,
        d_bias,
        taps,
        bias,
        x_base,
        dy_base,
        seq_idx_base,
        dx_base,
        first + BLOCK_T,
        first,
        length,
        channels,
        c,
        in_c,
        stride_x_token,
        stride_dy_token,
        stride_seq_idx_token,
        W,
        SILU,
        HAS_SEQ_IDX,
        W - 1,
        False,
    )
    partial_ptrs = partial_ptr + (row * tl.num_programs(1) + block) * (W + 1) * channels + c
    for k in tl.static_range(W):
        tl.store(partial_ptrs + k * channels, d_taps[k], mask=in_c)
    tl.store(partial_ptrs + W * channels, d_bias, mask=in_c)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None, silu: bool = False
) -> Tensor:
    """See `reference.causal_conv`, from zeros; differentiates in x, weight and bias, through torch.compile as well.

    x is bfloat16, float16 or float32 and W at most 8. Sums run in float32 with the weights as they are, and are rounded
    once, to x's type. Keeps nothing for the backward pass but its arguments.
    """
    if not fits(x, weight):
        raise ValueError(
            f"x {x.dtype} and a convolution over {weight.shape[1]} tokens: the kernels take {DTYPES} and up to "
            f"{LARGEST_WIDTH} tokens: call reference.causal_conv for others"
        )
    return torch.ops.mamballama.causal_conv_train(x, weight, bias, seq_idx, silu)


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, bool silu"


@torch.library.custom_op("mamballama::causal_conv_train", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def _forward(x, weight, bias, seq_idx, silu):
    x, weight = rows_contiguous(x), rows_contiguous(weight)
    batch, length, channels = x.shape
    y = _output(x, weight, bias, seq_idx, silu)
    config = launch_config("forward", batch, length, channels)
    _forward_kernel[(triton.cdiv(channels, config["BLOCK_C"]), triton.cdiv(length, config["STEPS"]), batch)](
        x,
        weight,
        None if bias is None else bias.contiguous(),
        seq_idx,
        y,
        length,
        channels,
        *x.stride()[:2],
        weight.stride(0),
        *document_strides(seq_idx),
        W=weight.shape[1],
        SILU=silu,
        HAS_BIAS=bias is not None,
        HAS_SEQ_IDX=seq_idx is not None,
        **config,
    )
    return y


@_forward.register_fake
def _output(x, weight, bias, seq_idx, silu):
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "mamballama::causal_conv_train_backward",
    mutates_args=(),
    schema=f"(Tensor dy, {_INPUTS}) -> (Tensor dx, Tensor dweight_dbias)",
)
def _backward(dy, x, weight, bias, seq_idx, silu):
    dy, x, weight = (rows_contiguous(t) for t in (dy, x, weight))
    batch, length, channels = x.shape
    width = weight.shape[1]
    dx, sums = _gradients(dy, x, weight, bias, seq_idx, silu)
    config = launch_config("backward", batch, length, channels)
    blocks = triton.cdiv(length, config["BLOCK_T"])
    partial = x.new_empty(batch, blocks, width + 1, channels, dtype=torch.float32)
    _backward_kernel[(triton.cdiv(channels, config["BLOCK_C"]), blocks, batch)](
        x,
        weight,
        None if bias is None else bias.contiguous(),
        seq_idx,
        dy,
        dx,
        partial,
        length,
        channels,
        *x.stride()[:2],
        *dy.stride()[:2],
        weight.stride(0),
        *document_strides(seq_idx),
        W=width,
        SILU=silu,
        HAS_BIAS=bias is not None,
        HAS_SEQ_IDX=seq_idx is not None,
        **config,
    )
    torch.sum(partial, dim=(0, 1), out=sums)
    return dx, sums


@_backward.register_fake
def _gradients(dy, x, weight, bias, seq_idx, silu):
    return x.new_empty(x.shape), x.new_empty(weight.shape[1] + 1, x.shape[2], dtype=torch.float32)


def _remember(ctx, inputs, output) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dy):
    x, weight, bias, seq_idx = ctx.saved_tensors
    dx, sums = torch.ops.mamballama.causal_conv_train_backward(dy, x, weight, bias, seq_idx, ctx.silu)
    dweight, dbias = sums.split([weight.shape[1], 1])
    return dx, dweight.t().to(weight.dtype), None if bias is None else dbias[0].to(bias.dtype), None, None


_forward.register_autograd(_differentiate, setup_context=_remember)
