"""Published numbers of trained parameters, as integers to assert on models without weights.

A `Count` says: this method with these options at these sites of this architecture trains `count` parameters,
new heads left out. `rule` is the arithmetic of the source from the architecture's facts alone, so that each
integer has two origins. `published` is how the source prints it, and `agrees` whether that is the integer, up
to its rounding. Options are named as in this package's pages; `sites` is a selector, None where the method's
own places are meant.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from ._architectures import ARCHITECTURES, Architecture

__all__ = ["ARCHITECTURES", "COUNTS", "Count"]

QV = "attention.{query,value}"
SIX = "{attention.{query,key,value,output},mlp.{up,down}}"
SEVEN = "{attention.{query,key,value,output},mlp.{gate,up,down}}"
FIVE = "{attention.{query,key,value},mlp.{up,down}}"


@dataclass(frozen=True)
class Count:
    method: str
    options: dict
    architecture: str
    count: int
    rule: Callable[[Architecture, dict], int]
    source: str
    sites: str | None = None
    published: str = ""
    agrees: bool = True
    note: str = field(default="")


def pairs(*shapes: str) -> Callable[[Architecture, dict], int]:
    """rank * sum(in + out) over one block's linears, given by letters as "dd", "df": in and out."""

    def rule(a: Architecture, o: dict) -> int:
        size = {"d": a.d, "f": a.f, "k": a.kv, "i": a.inner}
        return a.blocks * o["rank"] * sum(size[one] + size[other] for one, other in shapes)

    return rule


QV_SHAPES = ("di", "dk")
SIX_SHAPES = ("di", "dk", "dk", "id", "df", "fd")
SEVEN_SHAPES = ("di", "dk", "dk", "id", "df", "df", "fd")
FIVE_SHAPES = ("di", "dk", "dk", "df", "fd")


def with_outputs(*shapes: str) -> Callable[[Architecture, dict], int]:
    """DoRA: the pairs, and one magnitude an output row."""

    def rule(a: Architecture, o: dict) -> int:
        size = {"d": a.d, "f": a.f, "k": a.kv, "i": a.inner}
        return pairs(*shapes)(a, o) + a.blocks * sum(size[out] for _, out in shapes)

    return rule


def houlsby(a: Architecture, o: dict) -> int:
    return 2 * a.blocks * (2 * a.d * o["m"] + o["m"] + a.d)


def pfeiffer(a: Architecture, o: dict) -> int:
    return houlsby(a, o) // 2


def reft(places: int) -> Callable[[Architecture, dict], int]:
    return lambda a, o: places * (2 * a.d * o["rank"] + o["rank"])


def vera(outputs: Callable[[Architecture], int], sites: int) -> Callable[[Architecture, dict], int]:
    return lambda a, o: a.blocks * (outputs(a) + sites * o["rank"])


def prefix(a: Architecture, o: dict) -> int:
    return 2 * a.blocks * o["length"] * a.kv


def prompt(a: Architecture, o: dict) -> int:
    return o["length"] * a.d


def hyper(a: Architecture, o: dict) -> int:
    t, hidden, e, m, d = 64, 128, 64, 24, a.d
    trunk = (3 * t + 1) * hidden + (hidden + 1) * e + 2 * e
    generators = (e + 1) * (2 * d * m + d + m) + 2 * (e + 1) * d
    return o["tasks"] * t + a.blocks * t + 2 * t + trunk + generators


LORA, REFT, BENCH = "arXiv:2106.09685", "arXiv:2404.03592", "HF PEFT's method comparison, Llama-3.2-3B"
DORA, VERA, OFT, IA3 = "arXiv:2402.09353", "arXiv:2310.11454", "arXiv:2306.07280", "arXiv:2205.05638"
HUB, TABLES = (
    "the formula on BERT-base",
    "published tables",
)  # TABLES: printed in several, the first is not known

COUNTS = [
    Count("lora", {"rank": 8}, "llama_7b", 4_194_304, pairs(*QV_SHAPES), TABLES, QV, "4.2M"),
    Count("lora", {"rank": 16}, "llama_7b", 8_388_608, pairs(*QV_SHAPES), TABLES, QV, "8.39M"),
    Count("lora", {"rank": 64}, "llama_7b", 33_554_432, pairs(*QV_SHAPES), "arXiv:2405.03003", QV, "33.5M"),
    Count("lora", {"rank": 64}, "llama_7b", 159_907_840, pairs(*SEVEN_SHAPES), VERA, SEVEN, "159.9M"),
    Count("lora", {"rank": 64}, "llama_13b", 250_347_520, pairs(*SEVEN_SHAPES), VERA, SEVEN, "250.3M"),
    Count("lora", {"rank": 32}, "llama_7b", 56_098_816, pairs(*FIVE_SHAPES), DORA, FIVE,
          "0.826 % of base and new"),
    Count("lora", {"rank": 32}, "llama_13b", 87_818_240, pairs(*FIVE_SHAPES), DORA, FIVE, "0.670 %"),
    Count("lora", {"rank": 32}, "llama3_8b", 56_623_104, pairs(*FIVE_SHAPES), DORA, FIVE, "0.700 %"),
    Count("lora", {"rank": 8}, "roberta_base", 294_912, pairs(*QV_SHAPES), LORA, QV, "0.3M"),
    Count("lora", {"rank": 8}, "roberta_large", 786_432, pairs(*QV_SHAPES), LORA, QV, "0.8M"),
    Count("lora", {"rank": 4}, "gpt2_medium", 393_216, pairs(*QV_SHAPES), LORA, QV, "0.35M", agrees=False,
          note="the published file of 1.5 MB is 393,216 numbers of 4 bytes; sites cut out of a fused layer"),
    Count("lora", {"rank": 4}, "gpt2_large", 737_280, pairs(*QV_SHAPES), "arXiv:2405.03003", QV, "737K"),
    Count("lora", {"rank": 16}, "deberta_xxl", 4_718_592, pairs(*QV_SHAPES), LORA, QV, "4.7M"),
    Count("lora", {"rank": 1}, "gpt3", 4_718_592, pairs(*QV_SHAPES), LORA, QV, "4.7M"),
    Count("lora", {"rank": 8}, "gpt3", 37_748_736, pairs(*QV_SHAPES), LORA, QV, "37.7M"),
    Count("lora", {"rank": 8}, "deberta_v3_base", 1_327_104, pairs(*SIX_SHAPES), "arXiv:2303.10512", SIX,
          "1.33M"),
    Count("lora", {"rank": 2}, "deberta_v3_base", 331_776, pairs(*SIX_SHAPES), "arXiv:2303.10512", SIX,
          "0.33M"),
    Count("lora", {"rank": 4}, "vit_large", 1_769_472, pairs(*SIX_SHAPES), "arXiv:2311.06243", SIX, "1.77M"),
    Count("lora", {"rank": 8}, "vit_base", 294_912, pairs(*QV_SHAPES), TABLES, QV, "0.29M"),
    Count("lora", {"rank": 8}, "flan_t5_small", 344_064, lambda a, o: 3 * pairs(*QV_SHAPES)(a, o),
          "HF PEFT's manual", "{attention,cross_attention}.{query,value}", "344,064"),
    Count("hira", {"rank": 32}, "opt_125m", 4_718_592, pairs(*FIVE_SHAPES), "HF PEFT's manual", FIVE,
          "4,718,592"),
    Count("dora", {"rank": 32}, "llama_7b", 56_975_360, with_outputs(*FIVE_SHAPES), DORA, FIVE, "0.838 %"),
    Count("dora", {"rank": 16}, "llama_7b", 28_925_952, with_outputs(*FIVE_SHAPES), DORA, FIVE, "0.427 %"),
    Count("prefix_tuning", {"length": 10}, "llama_7b", 2_621_440, prefix, REFT, None, "0.039 %"),
    Count("prefix_tuning", {"length": 5}, "gpt2_medium", 245_760, prefix, "arXiv:2101.00190", None,
          "250K (0.1 %)"),
    Count("loreft", {"rank": 8, "tied": True}, "llama_7b", 2_097_408, reft(32), REFT, None, "0.031 %"),
    Count("loreft", {"rank": 8, "tied": True}, "llama_13b", 3_277_120, reft(40), REFT, None, "0.025 %"),
    Count("loreft", {"rank": 4, "tied": False}, "llama_7b", 262_176, reft(8), REFT, "block[3,9,18,24]",
          "0.0039 %"),
    Count("loreft", {"rank": 4, "tied": True}, "llama_7b", 131_088, reft(4), REFT, "block[3,9,18,24]",
          "0.0019 %"),
    Count("loreft", {"rank": 4, "tied": True}, "llama_7b", 32_772, reft(1), REFT, "block[15]", "32,772"),
    Count("loreft", {"rank": 1, "tied": True}, "roberta_base", 18_444, reft(12), REFT, None, "0.015 %"),
    Count("loreft", {"rank": 1, "tied": True}, "roberta_large", 49_176, reft(24), REFT, None, "0.014 %"),
    Count("loreft", {"rank": 1, "tied": False}, "bert_base", 36_888, reft(24), "an AdapterHub notebook", None,
          "36,888"),
    Count("serial_adapter", {"m": 1}, "gpt3", 7_078_080, houlsby, LORA, None, "7.1M"),
    Count("serial_adapter", {"m": 8}, "gpt3", 40_109_568, houlsby, LORA, None, "40.1M"),
    Count("serial_adapter", {"m": 64}, "roberta_large", 6_343_680, houlsby, LORA, None, "6.0M", agrees=False),
    Count("serial_adapter", {"m": 8}, "roberta_large", 835_968, houlsby, LORA, None, "0.8M"),
    Count("serial_adapter", {"m": 32}, "deberta_v3_base", 1_198_848, houlsby, "arXiv:2303.10512", None,
          "1.22M", agrees=False),
    Count("serial_adapter", {"m": 16}, "deberta_v3_base", 608_640, houlsby, "arXiv:2303.10512", None,
          "0.61M"),
    Count("serial_adapter", {"m": 8}, "deberta_v3_base", 313_536, houlsby, "arXiv:2303.10512", None, "0.31M"),
    Count("serial_adapter", {"m": 48}, "bert_base", 1_789_056, houlsby, HUB, None, note="reduction 16"),
    Count("pfeiffer_adapter", {"m": 48}, "bert_base", 894_528, pfeiffer, HUB, None, note="reduction 16"),
    Count("pfeiffer_adapter", {"m": 64}, "roberta_large", 3_171_840, pfeiffer, LORA, None, "3.0M",
          agrees=False),
    Count("pfeiffer_adapter", {"m": 16}, "roberta_large", 811_392, pfeiffer, LORA, None, "0.8M"),
    Count("pfeiffer_adapter", {"m": 64}, "deberta_v3_base", 1_189_632, pfeiffer, "arXiv:2303.10512", None,
          "1.18M"),
    Count("pfeiffer_adapter", {"m": 32}, "deberta_v3_base", 599_424, pfeiffer, "arXiv:2303.10512", None,
          "0.60M"),
    Count("pfeiffer_adapter", {"m": 16}, "deberta_v3_base", 304_320, pfeiffer, "arXiv:2303.10512", None,
          "0.30M"),
    Count("parallel_adapter", {"m": 384}, "bert_base", 7_091_712, pfeiffer, HUB, None, note="reduction 2"),
    Count("adapter_plus", {"m": 8}, "bert_base", 165_984, lambda a, o: pfeiffer(a, o) + a.blocks * a.d, HUB,
          note="reduction 96, a learned scale a channel"),
    Count("invertible_adapter", {"form": "nice"}, "bert_base", 296_064,
          lambda a, o: a.d**2 // 2 + 3 * a.d // 2, HUB, note="reduction 2"),
    Count("compacter", {"n": 4, "rank": 1, "m": 24}, "bert_base", 57_088,
          lambda a, o: o["n"] ** 3 + 2 * a.blocks * (2 * o["rank"] * (a.d + o["m"]) + a.d + o["m"]), HUB),
    Count("compacter_pp", {"n": 4, "rank": 1, "m": 24}, "bert_base", 28_576,
          lambda a, o: o["n"] ** 3 + a.blocks * (2 * o["rank"] * (a.d + o["m"]) + a.d + o["m"]), HUB),
    Count("hyperformer", {"tasks": 0}, "bert_base", 2_581_464, hyper, HUB,
          note="++: t 64, e' 128, e 64, m 24, norm generated; 64 more a task"),
    Count("prefix_tuning", {"length": 30}, "bert_base", 552_960, prefix, HUB),
    Count("prefix_tuning", {"length": 30, "projection": 512}, "bert_base", 9_872_384,
          lambda a, o: o["length"] * a.d + (a.d + 1) * 512 + 513 * 2 * a.blocks * a.d, HUB),
    Count("bitfit", {}, "bert_large", 272_384, lambda a, o: a.blocks * (7 * a.d + a.f) + 2 * a.d,
          "arXiv:2106.10199", None, "0.08 %", note="all biases, pooler included"),
    Count("bitfit", {}, "bert_base", 102_912, lambda a, o: a.blocks * (7 * a.d + a.f) + 2 * a.d,
          "arXiv:2106.10199", None, "0.09 %", note="all biases, pooler included"),
    Count("bitfit", {}, "roberta_base", 102_144, lambda a, o: a.blocks * (7 * a.d + a.f) + a.d, LORA, None,
          "0.1M", note="no pooler"),
    Count("bitfit", {}, "vit_base", 102_912, lambda a, o: a.blocks * (7 * a.d + a.f) + 2 * a.d, TABLES, None,
          "0.103M", note="patch embedding and final norm included, no pooler"),
    Count("vera", {"rank": 1024}, "roberta_base", 43_008, vera(lambda a: 2 * a.d, 2), VERA, QV, "0.043M"),
    Count("vera", {"rank": 256}, "roberta_large", 61_440, vera(lambda a: 2 * a.d, 2), VERA, QV, "0.061M"),
    Count("vera", {"rank": 1024}, "gpt2_medium", 98_304, vera(lambda a: 2 * a.d, 2), VERA, QV, "0.098M"),
    Count("vera", {"rank": 1024}, "gpt2_large", 165_888, vera(lambda a: 2 * a.d, 2), VERA, QV, "0.17M"),
    Count("vera", {"rank": 1024}, "llama_7b", 1_589_248, vera(lambda a: 5 * a.d + 2 * a.f, 7), VERA, SEVEN,
          "1.6M"),
    Count("vera", {"rank": 1024}, "llama_13b", 2_416_640, vera(lambda a: 5 * a.d + 2 * a.f, 7), VERA, SEVEN,
          "2.4M"),
    Count("vera", {"rank": 256}, "vit_base", 24_576, vera(lambda a: 2 * a.d, 2), VERA, QV, "24.6K"),
    Count("vera", {"rank": 256}, "vit_large", 61_440, vera(lambda a: 2 * a.d, 2), VERA, QV, "61.4K"),
    Count("oft", {"block_size": 16}, "llama_7b", 8_540_160, lambda a, o: a.blocks * (6 * a.d + a.f) * 15 // 2,
          TABLES, SEVEN, "0.13 %"),
    Count("ia3", {}, "t0_3b", 540_672, lambda a, o: a.blocks * (6 * a.kv + 2 * a.f), IA3, None, "0.01 %",
          agrees=False, note="0.019 %, cut off and not rounded"),
    Count("ia3", {}, "t0_11b", 1_081_344, lambda a, o: a.blocks * (6 * a.kv + 2 * a.f), IA3, None, "4.2 MB"),
    Count("ia3", {}, "roberta_base", 55_296, lambda a, o: a.blocks * (2 * a.kv + a.f), TABLES, None,
          "0.04 %"),
    Count("ia3", {}, "bert_base", 55_296, lambda a, o: a.blocks * (2 * a.kv + a.f), HUB),
    Count("prompt_tuning", {"length": 5}, "t5_xxl", 20_480, prompt, "arXiv:2104.08691", None, "20,480"),
    Count("prompt_tuning", {"length": 100}, "t5_xxl", 409_600, prompt, "arXiv:2104.08691", None, "409,600"),
    Count("llama_adapter", {"length": 10, "blocks": 30, "gate": "head_tanh"}, "llama_7b", 1_229_760,
          lambda a, o: 30 * (10 * a.d + a.heads), "arXiv:2303.16199", "attention", "1.2M"),
    Count("visual_prompt_tuning", {"length": 50, "deep": True}, "vit_base", 460_800,
          lambda a, o: a.blocks * prompt(a, o), "arXiv:2203.12119", None, "0.53M", agrees=False,
          note="the published number is an average over tasks"),
    Count("red", {}, "roberta_base", 18_432, lambda a, o: 2 * a.blocks * a.d, "arXiv:2402.15179", None,
          "0.016 %"),
    Count("red", {}, "llama_7b", 262_144, lambda a, o: 2 * a.blocks * a.d, "arXiv:2402.15179", None,
          "0.0039 %"),
    Count("fourierft", {"frequencies": 1000}, "roberta_base", 24_000, lambda a, o: 2000 * a.blocks,
          "arXiv:2405.03003", QV, "0.024M"),
    Count("fourierft", {"frequencies": 1000}, "llama_7b", 64_000, lambda a, o: 2000 * a.blocks,
          "arXiv:2405.03003", QV, "64K"),
    Count("c3a", {"block_size": 128}, "roberta_base", 110_592, lambda a, o: 2 * a.blocks * a.d * a.d // 128,
          TABLES, QV, "0.111M"),
    Count("hra", {"reflections": 8}, "deberta_v3_base", 663_552, lambda a, o: a.blocks * 8 * (5 * a.d + a.f),
          "arXiv:2405.17484", SIX, "0.66M"),
    Count("hra", {"reflections": 32}, "llama_7b", 8_388_608, lambda a, o: a.blocks * 32 * 2 * a.d,
          "arXiv:2405.17484", QV, "0.12 %"),
    Count("road", {"variant": 1}, "roberta_base", 82_944, lambda a, o: a.blocks * (5 * a.d + a.f),
          "arXiv:2409.00119", SIX, "0.07 %"),
    Count("road", {"variant": 1}, "roberta_large", 221_184, lambda a, o: a.blocks * (5 * a.d + a.f),
          "arXiv:2409.00119", SIX, "0.06 %"),
    Count("ssf", {}, "vit_base", 205_824, lambda a, o: 2 * (a.blocks * (7 * a.d + a.f) + 2 * a.d),
          "arXiv:2210.08823", None, "0.20M", note="0.21M elsewhere"),
    Count("convpass", {"m": 8}, "vit_base", 327_552,
          lambda a, o: 2 * a.blocks * (16 * a.d + a.d + 8 + 9 * 64 + 8), "arXiv:2207.07039", None, "0.33M"),
    Count("adaptformer", {"m": 64}, "vit_base", 1_189_632, pfeiffer, "arXiv:2205.13535", None, "1.19M"),
    Count("lora_xs", {"rank": 25}, "roberta_large", 60_000, lambda a, o: 4 * a.blocks * 625,
          "arXiv:2405.17604", "{attention.{query,value,output},mlp.up}", "60K"),
    Count("norm_tuning", {}, "llama_7b", 266_240, lambda a, o: (2 * a.blocks + 1) * a.d, TABLES, None,
          "0.004 %"),
    # ---- one public benchmark, where each integer is the file's own
    Count("lora", {"rank": 32}, "llama32_3b", 9_175_040, pairs(*QV_SHAPES), BENCH, QV, "9,175,040"),
    Count("lora", {"rank": 64}, "llama32_3b", 18_350_080, pairs(*QV_SHAPES), BENCH, QV, "18,350,080"),
    Count("lora", {"rank": 10}, "llama32_3b", 9_461_760, pairs("df", "df", "fd"), BENCH, "mlp.{gate,up,down}",
          "9,461,760"),
    Count("lora_fa", {"rank": 32}, "llama32_3b", 3_670_016, lambda a, o: a.blocks * 32 * (a.d + a.kv), BENCH,
          QV, "3,670,016"),
    Count("mica", {"rank": 32}, "llama32_3b", 5_505_024, lambda a, o: a.blocks * 32 * 2 * a.d, BENCH, QV,
          "5,505,024"),
    Count("dora", {"rank": 32}, "llama32_3b", 9_289_728, with_outputs(*QV_SHAPES), BENCH, QV, "9,289,728"),
    Count("delora", {"rank": 32}, "llama32_3b", 9_175_096,
          lambda a, o: pairs(*QV_SHAPES)(a, o) + 2 * a.blocks, BENCH, QV, "9,175,096"),
    Count("adalora", {"rank": 64}, "llama32_3b", 18_353_664,
          lambda a, o: pairs(*QV_SHAPES)(a, o) + 2 * a.blocks * 64, BENCH, QV, "18,353,664",
          note="at the initial rank"),
    Count("loha", {"rank": 32}, "llama32_3b", 18_350_080, lambda a, o: 2 * pairs(*QV_SHAPES)(a, o), BENCH, QV,
          "18,350,080"),
    Count("lokr", {"rank": 32, "factor": 4}, "llama32_3b", 2_294_656,
          lambda a, o: a.blocks * (2 * 16 + 32 * (2 * a.d + a.d + a.kv) // 4), BENCH, QV, "2,294,656",
          note="a small matrix of 4 x 4 beside a pair of the large one"),
    Count("vera", {"rank": 256}, "llama32_3b", 129_024, vera(lambda a: a.d + a.kv, 2), BENCH, QV, "129,024"),
    Count("pvera", {"rank": 256}, "llama32_3b", 143_360, lambda a, o: a.blocks * (a.d + a.kv + 4 * 256),
          BENCH, QV, "143,360"),
    Count("fourierft", {"frequencies": 1000}, "llama32_3b", 56_000, lambda a, o: 2000 * a.blocks, BENCH, QV,
          "56,000"),
    Count("oft", {"block_size": 96}, "llama32_3b", 8_171_520, lambda a, o: 2 * a.blocks * 32 * 96 * 95 // 2,
          BENCH, QV, "8,171,520", note="32 blocks in HF PEFT's terms"),
    Count("boft", {"block_size": 4, "factors": 1}, "llama32_3b", 802_816,
          lambda a, o: a.blocks * (2 * 4 * a.d + a.d + a.kv), BENCH, QV, "802,816",
          note="stored as full blocks, and a scale an output"),
    Count("psoft", {"rank": 256}, "llama32_3b", 1_856_512, lambda a, o: 2 * a.blocks * (256 * 255 // 2 + 512),
          BENCH, QV, "1,856,512"),
    Count("ia3", {}, "llama32_3b", 286_720, lambda a, o: a.blocks * (2 * a.kv + a.f), BENCH, None, "286,720"),
    Count("road", {"variant": 2}, "llama32_3b", 229_376, lambda a, o: 2 * a.blocks * (a.d + a.kv), BENCH, QV,
          "229,376"),
    Count("miss", {"rank": 64}, "llama32_3b", 7_340_032, lambda a, o: 64 * a.blocks * (a.d + a.kv), BENCH, QV,
          "7,340,032"),
    Count("c3a", {"block_size": 64}, "llama32_3b", 5_505_024,
          lambda a, o: a.blocks * a.d * (a.d + a.kv) // 64, BENCH, QV, "5,505,024"),
    Count("prefix_tuning", {"length": 200}, "llama32_3b", 11_468_800, prefix, BENCH, None, "11,468,800"),
    Count("prefix_tuning", {"length": 50}, "llama32_3b", 2_867_200, prefix, BENCH, None, "2,867,200"),
    Count("prompt_tuning", {"length": 200}, "llama32_3b", 614_400, prompt, BENCH, None, "614,400"),
    Count("p_tuning", {"length": 20}, "llama32_3b", 28_382_208,
          lambda a, o: prompt(a, o) + 3 * (a.d**2 + a.d), BENCH, None, "28,382,208"),
    Count("llama_adapter", {"length": 100, "gate": "layer"}, "llama32_3b", 8_601_628,
          lambda a, o: a.blocks * (100 * a.d + 1), BENCH, None, "8,601,628"),
    Count("norm_tuning", {}, "llama32_3b", 175_104, lambda a, o: (2 * a.blocks + 1) * a.d, BENCH, None,
          "175,104"),
    Count("beft", {}, "llama32_3b", 28_672, lambda a, o: a.blocks * a.kv, BENCH, "attention.value", "28,672"),
    Count("trainable_tokens", {"tokens": 2}, "llama32_3b", 6_144, lambda a, o: 2 * a.d, BENCH, None, "6,144"),
]  # fmt: skip
