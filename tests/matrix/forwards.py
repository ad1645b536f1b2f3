"""Forwards of decoder layers that have been read, by the digest of their code.

What each returns is in the table of grains_vllm/layers.py. A release with another forward fails the
matrix, which prints it: read it, correct the table if need be, and add the digest here.
"""

FORWARDS = {
    "gemma.GemmaDecoderLayer": ("b1136578122e",),
    "gemma2.Gemma2DecoderLayer": ("5a250d30c7e0",),
    "gemma3.Gemma3DecoderLayer": ("edd9b6361bc6",),
    "glm4.Glm4DecoderLayer": ("f40236569311",),
    "gpt_oss.TransformerBlock": ("6139edc15f28",),
    "internlm2.InternLMDecoderLayer": ("6dcba11f19e1",),
    "llama.LlamaDecoderLayer": ("b1136578122e",),
    "llama4.Llama4DecoderLayer": ("97f600a2109c",),
    "mistral.MistralDecoderLayer": ("444c3a179cac",),
    "mixtral.MixtralDecoderLayer": ("eda17baaa0fb",),
    "olmoe.OlmoeDecoderLayer": ("fa7c68f13a22",),
    "qwen2.Qwen2DecoderLayer": ("b1136578122e",),
    "qwen2_moe.Qwen2MoeDecoderLayer": ("fa7c68f13a22",),
    "qwen3.Qwen3DecoderLayer": ("b1136578122e",),
    "qwen3_moe.Qwen3MoeDecoderLayer": ("b1136578122e",),
    "bloom.BloomBlock": ("783815b61cde",),
    "falcon.FalconDecoderLayer": ("38e002f22881",),
    "gpt2.GPT2Block": ("031d4556e3a8",),
    "gpt_j.GPTJBlock": ("9ad6e9404778",),
    "granite.GraniteDecoderLayer": ("99b438bf864e",),
    "opt.OPTDecoderLayer": ("be810638dd4b",),
    "commandr.CohereDecoderLayer": (
        "65d73f6ab469",
        "d816baf17884",
    ),
    "exaone4.Exaone4DecoderLayer": ("fb6bd3bb5c7c",),
    "minicpm.MiniCPMDecoderLayer": ("7393f5ac65c2",),
    "phimoe.PhiMoEDecoderLayer": ("53032f9d5671",),
    "stablelm.StablelmDecoderLayer": ("d146641a7daa",),
}
