"""Twenty classes of transformers from the bench: what is not seen is said, nothing is changed."""

import warnings
from collections import Counter

import pytest

from tests.bench.model_zoo import examine

SAMPLE = (
    "GPT2LMHeadModel:gpt2 LlamaForCausalLM:llama Inkling2ForCausalLM:inkling2_text "
    "GptOssForCausalLM:gpt_oss "
    "BloomForCausalLM:bloom MambaForCausalLM:mamba BertForMaskedLM:bert "
    "BigBirdForMaskedLM:big_bird "
    "LongformerForMaskedLM:longformer DebertaV2ForMaskedLM:deberta-v2 FNetForMaskedLM:fnet "
    "T5ForConditionalGeneration:t5 PegasusXForConditionalGeneration:pegasus_x "
    "RoFormerForCausalLM:roformer "
    "ViTForImageClassification:vit SegformerForSemanticSegmentation:segformer "
    "ConvBertForMaskedLM:convbert "
    "DeepseekV3ForCausalLM:deepseek_v3 CLIPModel:clip BeitForImageClassification:beit"
)
"""One of each kind: fused, hand-written, grouped, latent, sinks, experts, windows, cross-attention,
images, two towers, none.
"""
FINE = {"exact", "partly, said", "none, said", "no attention"}


@pytest.mark.long
def test_in_twenty_kinds_of_models_nothing_is_silent_wrong_or_changed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {pair.split(":")[0]: examine(*pair.split(":")) for pair in SAMPLE.split()}
    assert {name: outcome for name, outcome in found.items() if outcome[0] not in FINE} == {}
    outcomes = Counter(outcome for outcome, _ in found.values())
    assert outcomes["no attention"] == 2
    assert outcomes["exact"] >= 15
