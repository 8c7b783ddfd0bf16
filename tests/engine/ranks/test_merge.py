"""Check what ranks conclude from each other's descriptions, with none running."""

from stabmon.engine.ranks.merge import Held, merge

FACTS = {"heads": 2, "head_dim": 8, "scale": 0.5, "dtype": "float32"}
SIGNALS = ("attention_entropy", "max_logit")


def held(values=1, layers=("attn",), *, names=1, mesh=(0,), stage=None, shard=0, heads=2):
    given = {each: (shard, heads, list(SIGNALS), FACTS) for each in layers}
    sums = {f"gradient of {each}": ("gradient of ", 1) for each in (*layers, "")}
    return Held(names, values, list(mesh), stage, given, sums)


def names(agreed):
    return agreed.layers


def test_replicas_are_one_stage_without_a_prefix() -> None:
    agreed = merge([held(), held()])
    assert (names(agreed), agreed.is_staged, agreed.words()) == (["attn"], False, "")
    assert agreed.added["gradient of attn"] == (1, 2)


def test_stages_of_equal_names_get_a_prefix_and_a_line() -> None:
    agreed = merge([held(5), held(6), held(5), held(6)])  # two replicas of each
    assert names(agreed) == ["stage0.attn", "stage1.attn"]
    assert agreed.stage_of == [0, 1, 0, 1]
    assert agreed.added["gradient of stage1.attn"] == (1, 2)
    assert agreed.added["gradient of "] == (1, 4)
    assert "stage1 (rank 1)" in agreed.words()
    share = agreed.share_of(3, {})
    assert share.own("stage1.attn") == "attn"
    assert share.is_elsewhere("stage0.attn")


def test_stages_that_keep_the_names_of_the_whole_model_keep_them() -> None:
    agreed = merge([held(5, ["h.0"]), held(6, ["h.1"])])
    assert names(agreed) == ["h.0", "h.1"]
    assert agreed.share_of(0, {}).elsewhere == {"h.1"}
    assert "pipeline stages" in agreed.words()


def test_equal_weights_on_two_stages_are_told_apart_where_stages_are_said() -> None:
    agreed = merge([held(5, stage=1), held(5, stage=0)])
    assert agreed.stage_of == [1, 0]
    assert names(agreed) == ["stage0.attn", "stage1.attn"]


def test_stages_that_are_sharded_by_themselves_are_told_apart_by_all_of_their_parts() -> None:
    """FSDP within each stage: ranks 0 and 1 hold parts of one stage, 2 and 3 of the other."""
    ranks = [
        held(values, mesh=mesh)
        for values, mesh in [(1, (0, 1)), (2, (0, 1)), (3, (2, 3)), (4, (2, 3))]
    ]
    assert merge(ranks).stage_of == [0, 0, 1, 1]
    replicas = [*ranks[:2], held(1, mesh=(2, 3)), held(2, mesh=(2, 3))]
    assert merge(replicas).stage_of == [0, 0, 0, 0]


def test_shards_of_heads_are_put_in_order_whatever_their_rank() -> None:
    agreed = merge([held(shard=1, heads=3), held(shard=0, heads=5)])
    assert agreed.entries == [("attn", name, 8) for name in SIGNALS]
    assert agreed.share_of(0, {"attn": 1}).heads == {"attn": (5, 8)}
    assert agreed.share_of(1, {"attn": 0}).heads == {"attn": (0, 8)}
    assert agreed.facts()["attn"].heads == 8


def test_a_stage_without_attention_has_no_layer_and_knows_those_of_others() -> None:
    agreed = merge([held(5, []), held(6, ["attn"])])
    assert names(agreed) == ["attn"]
    assert agreed.share_of(0, {}).elsewhere == {"attn"}
