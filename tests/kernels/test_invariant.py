"""Batch-invariant passes: the bits of a row are those of a pass that holds it alone.

On a CPU Triton's interpreter runs the kernels, with products whose order per element is fixed
(:func:`ordered_products`), which tests the order of operations. On a GPU the same tests run the compiled kernels, on
more shapes.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from subspec.decoding.audit import Auditor
from subspec.decoding.batch import TokenBatch
from subspec.decoding.bitwise import ROLES, BitwiseArithmetic
from subspec.decoding.engine import Engine
from subspec.decoding.sampling import Sampling
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import Beam
from subspec.drafts.substitute import SubstituteDraft, share_parameters
from subspec.kernels.invariant_attention import Heads, attend, path_table, splits_of
from subspec.kernels.invariant_linear import CANDIDATES, REFERENCE, multiply, split_k
from tests.helpers.tiny import tiny_model

CPU = torch.device("cpu")
gpu = pytest.mark.gpu


@pytest.fixture(autouse=True)
def ordered_products(monkeypatch):
    """Replace NumPy's matrix product in the interpreter: its order of a row's sum depends on the row's place."""
    if torch.cuda.is_available():
        return
    from triton.runtime import interpreter

    def dot(self, a, b, d, *_):
        left, right = a.data.astype(np.float32), b.data.astype(np.float32)
        product = np.einsum("ik,kj->ij", left, right, optimize=False)
        return interpreter.TensorHandle(d.data + product, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def device_of_tests():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def same_bits(a, b):
    return a.shape == b.shape and torch.equal(*(x.contiguous().view(torch.int16) for x in (a, b)))


def arithmetic(model, tiling=None):
    tiling = tiling or (CANDIDATES[2] if torch.cuda.is_available() else REFERENCE)
    decoder = TargetModel(model)
    decoder.bitwise = BitwiseArithmetic(model, dict.fromkeys(ROLES, tiling))
    return decoder


def random_tree(nodes, generator, deepest=None):
    """Parents before children; ancestors and depths of a random tree of ``nodes`` nodes."""
    ancestors, depths = torch.eye(nodes, dtype=torch.bool), torch.zeros(nodes, dtype=torch.int64)
    for node in range(1, nodes):
        allowed = [n for n in range(node) if deepest is None or depths[n] < deepest]
        parent = allowed[int(torch.randint(len(allowed), (1,), generator=generator))]
        # Two of three nodes continue the last one, so that trees are deep.
        if torch.rand(1, generator=generator) < 0.66 and depths[node - 1] < (deepest or nodes):
            parent = node - 1
        ancestors[node] |= ancestors[parent]
        depths[node] = depths[parent] + 1
    return ancestors, depths


# ------------------------------------------------------------------------------------------- attention


def attend_tree(query, keys, values, past, ancestors, depths, heads):
    """Attention of a tree (or, with ``ancestors`` None, of a run of text) behind ``past`` tokens."""
    rows, levels = query.shape[0], int(depths.max())
    length = past + levels + 1
    device = query.device
    partial = torch.empty(heads.partial_floats(rows, length), dtype=torch.float32, device=device)
    out = torch.empty(rows, heads.query * heads.dim, dtype=query.dtype, device=device)
    is_tree = ancestors is not None
    paths = path_table(ancestors, depths, levels) if is_tree else depths.to(torch.int32)
    prefix = torch.tensor([past], device=device)
    attend(query, keys, values, past + depths, prefix, paths, is_tree=is_tree, length=length, heads=heads,
           scale=heads.dim**-0.5, partial=partial, out=out)  # fmt: skip
    return out


def test_trees_of_several_texts_have_the_bits_of_their_own_launches():
    heads, device, generator = Heads(4, 2, 16), device_of_tests(), torch.Generator().manual_seed(3)
    pasts, nodes, levels = (3, 70, 0), 6, 5
    trees = [random_tree(nodes, generator, levels) for _ in pasts]
    query = torch.randn(3 * nodes, heads.query, heads.dim, generator=generator).to(device, torch.bfloat16)
    caches = torch.randn(3, 2, heads.kv, 80, heads.dim, generator=generator).to(device, torch.bfloat16)
    paths = torch.cat([path_table(ancestors, depths, levels) for ancestors, depths in trees]).to(device)
    positions = torch.cat([past + depths for past, (_, depths) in zip(pasts, trees, strict=True)]).to(device)
    length = max(pasts) + levels + 1
    out = torch.empty(3 * nodes, heads.query * heads.dim, dtype=query.dtype, device=device)
    partial = torch.empty(heads.partial_floats(3 * nodes, length), dtype=torch.float32, device=device)
    attend(query, *caches[0], positions, torch.tensor(pasts, device=device), paths, is_tree=True, length=length,
           heads=heads, scale=heads.dim**-0.5, partial=partial, out=out, texts=3, cache_stride=caches.stride(0),
           )  # fmt: skip
    for number, (past, (ancestors, depths)) in enumerate(zip(pasts, trees, strict=True)):
        own = slice(number * nodes, (number + 1) * nodes)
        alone = attend_tree(query[own], *caches[number], past, ancestors.to(device), depths.to(device), heads)
        assert same_bits(out[own], alone), number


def check_attention(heads, past, nodes, seed, deepest=None, dtype=torch.bfloat16):
    device = device_of_tests()
    generator = torch.Generator().manual_seed(seed)
    ancestors, depths = random_tree(nodes, generator, deepest)
    query = torch.randn(nodes, heads.query, heads.dim, generator=generator).to(device, dtype)
    rows = torch.randn(2, heads.kv, past + nodes, heads.dim, generator=generator).to(device, dtype)
    keys, values = rows
    ancestors, depths = ancestors.to(device), depths.to(device)
    out = attend_tree(query, keys, values, past, ancestors, depths, heads)
    order = torch.randperm(nodes, generator=generator)[: min(nodes, 24)].tolist()
    for node in order:
        # Plain decoding of this node: its ancestors are the text, it is the only row.
        path = ancestors[node].nonzero()[:, 0]
        held = torch.cat([torch.arange(past, device=device), past + path])
        position = past + int(depths[node])
        alone = attend_tree(
            query[node : node + 1], keys[:, held].contiguous(), values[:, held].contiguous(), position,
            None, torch.zeros(1, dtype=torch.int64, device=device), heads,
        )  # fmt: skip
        assert same_bits(out[node : node + 1], alone), f"node {node} at position {position}"
    # The numbers themselves.
    groups = heads.query // heads.kv
    k, v = (t.float().repeat_interleave(groups, 0) for t in (keys, values))
    scores = torch.einsum("nhd,hkd->hnk", query.float(), k) * heads.dim**-0.5
    visible = torch.cat([torch.ones(nodes, past, dtype=torch.bool, device=device), ancestors], 1)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    expected = torch.einsum("hnk,hkd->nhd", weights, v).flatten(1)
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("heads", "past", "nodes"),
    [
        (Heads(4, 2, 16), 62, 6),  # the tree crosses a block's border
        (Heads(3, 1, 12), 64, 5),
        (Heads(2, 2, 20), 1023, 4),  # and a split's
        (Heads(4, 4, 8), 0, 5),
    ],
)
def test_a_tree_attends_as_its_paths_do_one_row_at_a_time(heads, past, nodes):
    check_attention(heads, past, nodes, seed=past)


@gpu
@settings(max_examples=60, deadline=None)
@given(
    heads=st.sampled_from(
        [Heads(28, 4, 128), Heads(9, 3, 64), Heads(32, 8, 80), Heads(8, 8, 96), Heads(12, 2, 100), Heads(40, 8, 128),
         Heads(14, 2, 64), Heads(6, 3, 20), Heads(16, 1, 256), Heads(5, 5, 10)]
    ),
    past=st.one_of(
        st.sampled_from([0, 1, 63, 64, 65, 127, 128, 1000, 1023, 1024, 1025, 2047, 2048, 4095, 12000]),
        st.integers(0, 3000),
    ),
    nodes=st.integers(1, 300),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_random_trees_attend_as_their_paths_do(heads, past, nodes, seed):
    check_attention(heads, past, nodes, seed)


@gpu
@pytest.mark.parametrize("past", [0, 63, 64, 1023, 1024, 5000])
def test_a_run_of_text_attends_as_its_tokens_do(past):
    device, heads, count = torch.device("cuda"), Heads(28, 4, 128), 700
    generator = torch.Generator().manual_seed(past)
    query = torch.randn(count, heads.query, heads.dim, generator=generator).to(device, torch.bfloat16)
    keys, values = torch.randn(2, heads.kv, past + count, heads.dim, generator=generator).to(device, torch.bfloat16)
    depths = torch.arange(count, device=device)
    out = attend_tree(query, keys, values, past, None, depths, heads)
    for row in range(0, count, 23):
        alone = attend_tree(query[row : row + 1], keys, values, past + row, None, depths[:1], heads)
        assert same_bits(out[row : row + 1], alone)


# --------------------------------------------------------------------------------------------- linears


def check_linear(sizes, k, rows, tiling, *, bias, partial, dtype=torch.bfloat16):
    device = device_of_tests()
    generator = torch.Generator().manual_seed(k + rows)
    x = torch.randn(rows, k, generator=generator).to(device, dtype)
    weights = [torch.randn(n, k, generator=generator).to(device, dtype) for n in sizes]
    biases = [torch.randn(n, generator=generator).to(device, dtype) if bias else None for n in sizes]
    total = sum(sizes)

    def product(part):
        shape = (len(part), total)
        if partial:
            out = torch.empty(split_k(total, k).parts, *shape, dtype=torch.float32, device=device)
            multiply(part, weights, biases, out, tiling)
            return out.sum(0) if out.shape[0] == 1 else out[0] + sum(out[i] for i in range(1, out.shape[0]))
        out = torch.empty(shape, dtype=dtype, device=device)
        multiply(part, weights, biases, out, tiling)
        return out

    out = product(x)
    for row in sorted({0, 1, rows // 2, rows - 1} & set(range(rows))):
        assert torch.equal(product(x[row : row + 1].clone()), out[row : row + 1])
    order = torch.randperm(rows, generator=generator).to(device)
    assert torch.equal(product(x[order].contiguous()), out[order])
    whole = torch.cat(weights)
    expected = x.double() @ whole.double().t() + (torch.cat(biases).double() if bias else 0)
    torch.testing.assert_close(out.double(), expected, atol=0.02 * k**0.5, rtol=2e-2)
    return out


@pytest.mark.parametrize(
    ("sizes", "k", "rows", "bias", "partial"),
    [
        ((40, 24, 24), 96, 5, True, True),
        ((33,), 50, 3, False, False),
        ((70, 70), 64, 33, False, False),
        ((48,), 1100, 2, True, True),  # three parts of a sum
    ],
)
def test_a_row_of_a_product_is_the_same_in_any_company(sizes, k, rows, bias, partial):
    tiling = REFERENCE if device_of_tests() == CPU else CANDIDATES[0]
    check_linear(sizes, k, rows, tiling, bias=bias, partial=partial)


@gpu
@settings(max_examples=15, deadline=None)
@given(
    sizes=st.sampled_from([(3584, 512, 512), (576, 192, 192), (3584,), (1536, 1536), (331,), (1000, 7), (49152,)]),
    k=st.sampled_from([3584, 576, 1536, 18944, 100, 72]),
    rows=st.one_of(st.integers(1, 400), st.sampled_from([1, 6, 64, 65, 128, 320, 512, 1280])),
    bias=st.booleans(),
    partial=st.booleans(),
)
def test_products_of_real_shapes(sizes, k, rows, bias, partial):
    if sum(sizes) * k > 2**28:
        return
    outs = []
    for tiling in CANDIDATES:
        try:
            outs.append(check_linear(sizes, k, rows, tiling, bias=bias, partial=partial))
        except Exception as error:
            if "out of resource" not in str(error):
                raise
    assert outs
    # Bits must not depend on the tile shape that is fastest on a card.
    assert all(torch.equal(outs[0], other) for other in outs[1:])


def test_the_cut_of_a_sum_is_decided_by_the_matrix():
    wide = [(3584, 3584), (3584, 18944), (4608, 3584), (37888, 3584), (152064, 3584)]
    for n, k in [*wide, (576, 576), (576, 1536)]:
        split = split_k(n, k)
        assert split.size % 128 == 0
        assert (split.parts - 1) * split.size < k <= split.parts * split.size
    assert split_k(3584, 18944).parts == 4
    assert split_k(37888, 3584).parts == 1


# ----------------------------------------------------------------------------------------- whole passes

SHAPES = [
    ("llama", {"hidden_size": 32, "heads": 2, "kv_heads": 1, "intermediate_size": 40, "vocab_size": 61}),
    ("qwen2", {"hidden_size": 32, "heads": 4, "kv_heads": 2, "intermediate_size": 64, "vocab_size": 64}),
    ("qwen3", {"hidden_size": 40, "heads": 2, "kv_heads": 2, "intermediate_size": 32, "vocab_size": 33, "tie": True}),
]
GPU_SHAPES = [
    *SHAPES,
    ("mistral", {"hidden_size": 320, "heads": 4, "kv_heads": 2, "intermediate_size": 640}),  # heads of 80
    ("llama", {"hidden_size": 400, "heads": 4, "kv_heads": 2, "intermediate_size": 328, "vocab_size": 331}),
    ("qwen2", {"hidden_size": 512, "heads": 8, "kv_heads": 1, "intermediate_size": 1408, "layers": 4}),
    ("qwen3", {"hidden_size": 384, "heads": 4, "kv_heads": 4, "intermediate_size": 1000}),
]


def check_passes(family, shape, lengths, nodes, seed):
    """Prefill in two ways, one token at a time, and a tree behind it: the same logits and cache rows."""
    device = device_of_tests()
    model = tiny_model(family, max_positions=4096, **{"layers": 2, **shape}).to(device, torch.bfloat16)
    decoder = arithmetic(model)
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(decoder.vocab_size, (sum(lengths),), generator=generator).to(device)
    with torch.inference_mode():
        runs = []
        for parts in (lengths, [len(text)], [1] * len(text)):
            cache = decoder.new_cache(
                max_length=len(text) + nodes, draft_rows=len(parts) % 7, target_rows=max(*parts, nodes)
            )
            hidden = torch.cat([decoder.append(part, cache).final for part in text.split(parts)])
            begin = cache.draft_rows
            runs.append((decoder.logits(hidden), cache.rows[:, :, :, begin : begin + len(text)], cache))
        for logits, rows, _ in runs[1:]:
            assert same_bits(logits, runs[0][0])
            assert same_bits(rows, runs[0][1])
        cache, past = runs[0][2], len(text)
        ancestors, depths = random_tree(nodes, generator)
        tokens = torch.randint(decoder.vocab_size, (nodes,), generator=generator).to(device)
        ancestors, depths = ancestors.to(device), depths.to(device)
        batch = TokenBatch(tokens, depths, past, cache.target_view(nodes), int(depths.max()), ancestors)
        logits = decoder.logits(decoder.forward(batch).final)
        for node in {nodes // 2, nodes - 1, int(depths.argmax())}:
            path = ancestors[node].nonzero()[:, 0]
            own = decoder.new_cache(max_length=past + nodes, draft_rows=0, target_rows=max(past, nodes))
            decoder.append(text, own)
            for step in path:
                last = decoder.append(tokens[step : step + 1], own).final
            assert same_bits(decoder.logits(last), logits[node : node + 1])
    return model, text, runs[0][0]


@pytest.mark.parametrize(
    ("family", "shape"), [*(pytest.param(*shape, marks=pytest.mark.slow) for shape in SHAPES[:2]), SHAPES[2]]
)
def test_every_pass_gives_a_token_the_same_logits(family, shape):
    model, text, logits = check_passes(family, {**shape, "layers": 1}, [2, 1], 3, seed=0)
    with torch.inference_mode():
        expected = model.float()(text[None]).logits[0]
    # The interpreter cuts bfloat16 off where a GPU rounds it.
    torch.testing.assert_close(logits.float(), expected, atol=0.3, rtol=0.1)


@gpu
@settings(max_examples=25, deadline=None)
@given(
    case=st.sampled_from(GPU_SHAPES),
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    nodes=st.integers(1, 120),
    seed=st.integers(0, 1000),
)
def test_every_pass_gives_a_token_the_same_logits_on_a_gpu(case, lengths, nodes, seed):
    family, shape = case
    model, text, logits = check_passes(family, shape, lengths, nodes, seed)
    with torch.inference_mode():
        module = model(text[None]).logits[0].float()
        expected = model.float()(text[None]).logits[0]
    # No less exact than the library's own bfloat16.
    assert (logits.float() - expected).abs().mean() < 1.5 * (module - expected).abs().mean() + 1e-3


def test_pieces_of_the_mlp_change_no_bits(monkeypatch):
    device = device_of_tests()
    shape = {"hidden_size": 16, "heads": 2, "kv_heads": 1, "intermediate_size": 24, "layers": 1, "vocab_size": 33}
    model = tiny_model("llama", **shape).to(device, torch.bfloat16)
    decoder, text = arithmetic(model), torch.arange(17, device=device)
    found = []
    for most in (384, 12):
        monkeypatch.setattr("subspec.decoding.pass_shapes.MLP_ROWS", most)
        cache = decoder.new_cache(max_length=32, draft_rows=0, target_rows=17)
        with torch.inference_mode():
            found.append(decoder.append(text, cache).final)
    assert decoder.bitwise.shapes.mlp_piece(17) == 16
    assert same_bits(*found)


def test_slices_of_the_mlps_matrices_change_no_bits(monkeypatch):
    device = device_of_tests()
    shape = {"hidden_size": 160, "heads": 2, "kv_heads": 1, "intermediate_size": 272, "layers": 1, "vocab_size": 33}
    model = tiny_model("qwen2", **shape).to(device, torch.bfloat16)
    whole, sliced, text = arithmetic(model), arithmetic(model), torch.arange(5, device=device)
    monkeypatch.setattr("subspec.decoding.pass_shapes.SLICE_BYTES", 1)
    sliced.bitwise = BitwiseArithmetic(model, whole.bitwise.tilings, sliced=True)
    assert sliced.bitwise.shapes.slices("gate_up") == [(0, 128), (128, 128), (256, 16)]
    assert sliced.bitwise.shapes.slices("down") == [(0, 128), (128, 32)]
    found = []
    for decoder in (whole, sliced):
        cache = decoder.new_cache(max_length=32, draft_rows=0, target_rows=5)
        with torch.inference_mode():
            found.append(decoder.append(text, cache).final)
    assert same_bits(*found)


def test_a_value_that_is_not_finite_spoils_its_own_branch_only():
    device = device_of_tests()
    ancestors = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool, device=device)
    depths = torch.tensor([0, 1, 1], device=device)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, 16, generator=generator).to(device, torch.bfloat16)
    keys, values = torch.randn(2, 2, 13, 16, generator=generator).to(device, torch.bfloat16)
    values[:, 11, 3] = torch.inf  # of the first child
    out = attend_tree(query, keys, values, 10, ancestors, depths, Heads(4, 2, 16))
    assert out.isfinite().all(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize("heads", [Heads(28, 4, 128), Heads(32, 8, 80), Heads(24, 8, 128), Heads(9, 3, 64)])
def test_partial_sums_are_bounded_and_shorter_texts_need_no_more_than_longer_ones(heads):
    for rows in (1, 17, 256, 832, 4096):
        needed = [heads.partial_floats(rows, length) for length in range(1, 140000, 333)]
        assert needed == sorted(needed)
        assert 4 * needed[-1] < 2**27
        for length in (1, 1000, 1024, 1025, 2048, 40000, 131072):
            assert splits_of(length) == -(-length // 1024)
            pieces = heads.piece_rows(rows, length)
            assert pieces % 16 == 0 or pieces == rows
            assert sum(heads.partial_sizes(pieces, length)) <= heads.partial_floats(rows, length)


# ------------------------------------------------------------------------------------------- whole texts


@pytest.mark.parametrize(
    "sampling", [pytest.param(Sampling(), marks=pytest.mark.slow), Sampling(0.8, top_p=0.9)], ids=["greedy", "sampling"]
)
def test_a_drafted_text_is_plain_decodings_and_its_audit_compares_bits(sampling):
    device = device_of_tests()
    shape = {"hidden_size": 32, "heads": 2, "kv_heads": 1, "intermediate_size": 32, "layers": 1, "vocab_size": 64}
    model = tiny_model("llama", **shape).to(device, torch.bfloat16)
    prompt, count = [5, 17, 33], 5
    texts = []
    for policy in (None, Beam(2, 2)):
        draft = SubstituteDraft(share_parameters(model)) if policy else None
        engine = Engine(arithmetic(model), draft, policy, sampling=sampling, max_length=32, prefill_chunk=2)
        engine.keeps_digests = True
        texts.append(engine.generate(prompt, max_new_tokens=count, seed=3))
    plain, drafted = texts
    assert drafted.token_ids == plain.token_ids
    assert drafted.digests == plain.digests
    auditor = Auditor(arithmetic(model), sampling)
    result = auditor.audit(prompt, drafted.token_ids, seed=3, digests=drafted.digests)
    assert (result.bitwise, result.exact, result.errors) == (True, count, 0)
    digests = list(drafted.digests)
    digests[4] ^= 1  # the same token, chosen by other bits
    result = auditor.audit(prompt, drafted.token_ids, seed=3, digests=digests)
    assert (result.exact, result.near_tie, result.mismatch, result.errors) == (count - 1, 1, 0, 1)
