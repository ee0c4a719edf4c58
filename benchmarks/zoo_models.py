"""Models that others wrote, as jobs: small configurations, random weights, random data, nothing changed in them.

`pip install 'paceline[zoo]'` brings transformers; torch's own and the hand-written ones need nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import paceline
from paceline.load import load_job_file

VOCABULARY, LENGTH, CLASSES = 64, 8, 10
EXAMPLES = Path(__file__).parent.parent / "examples"


class Random(Dataset):  # type: ignore[type-arg]
    """Samples that are dicts of random tensors, the same for the same index."""

    def __init__(self, split: str, **fields: Callable[[torch.Generator], torch.Tensor]) -> None:
        self._length, self._fields = (32, fields) if split == "train" else (8, fields)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {name: make(generator) for name, make in self._fields.items()}


def tokens(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (LENGTH,), generator=generator)


def image(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(3, 32, 32, generator=generator)


def sound(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(800, generator=generator)


def spectrum(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(8, 32, generator=generator)


def label(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(CLASSES, (), generator=generator)


def letters(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(1, 16, (4,), generator=generator)


def logits_of(outputs: Any) -> torch.Tensor:
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


def next_tokens(outputs: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(logits_of(outputs).flatten(0, 1), batch["target"].flatten())


def classes(outputs: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(logits_of(outputs), batch["target"])


def pixels(outputs: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.mse_loss(outputs, batch["x"].mean(1, keepdim=True))


def ctc(outputs: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    log_p = logits_of(outputs).log_softmax(-1).transpose(0, 1)
    lengths = torch.full((log_p.shape[1],), log_p.shape[0])
    return F.ctc_loss(log_p, batch["target"], lengths, torch.full_like(lengths, 4))


def adamw(params: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3)


def make_job(model: Callable[[], nn.Module], loss: Callable[[Any, Any], Any], **fields: Any) -> paceline.Job:
    def inputs(batch: dict[str, torch.Tensor]) -> Any:
        given = {name: value for name, value in batch.items() if name != "target"}
        return given.get("x", given)

    return paceline.Job(
        model=model, data=lambda split: Random(split, **fields), loss=loss, optimizer=adamw, batch_size=8,
        epochs=1, inputs=inputs,
    )  # fmt: skip


def from_transformers(
    model: str, config: str, loss: Callable[[Any, Any], Any], fields: Any, **settings: Any
) -> Any:
    """A job on the class `model` of transformers."""

    def build() -> paceline.Job:
        import transformers

        configuration = getattr(transformers, config)(**settings)
        return make_job(lambda: getattr(transformers, model)(configuration), loss, **fields)

    return build


_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 40,
}  # fmt: skip
_TEXT = {"input_ids": tokens, "target": tokens}
_PAIRS = {"input_ids": tokens, "decoder_input_ids": tokens, "target": tokens}
_IMAGES = {"pixel_values": image, "target": label}
_DECODER = {"use_cache": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TWO_STACKS = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "use_cache": False,
}  # fmt: skip
_SPEECH = {
    "vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "layerdrop": 0.0, "apply_spec_augment": False,
}  # fmt: skip


def _text(name: str, **settings: Any) -> Any:
    return from_transformers(f"{name}ForCausalLM", f"{name}Config", next_tokens, _TEXT, **settings)


def _masked(name: str, **settings: Any) -> Any:
    return from_transformers(f"{name}ForMaskedLM", f"{name}Config", next_tokens, _TEXT, **settings)


def _picture(name: str, **settings: Any) -> Any:
    return from_transformers(
        f"{name}ForImageClassification", f"{name}Config", classes, _IMAGES, num_labels=CLASSES, **settings
    )


class TorchTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.transformer = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.transformer(self.embedding(x), self.embedding(x.flip(1)), tgt_mask=mask))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.SiLU())

        self.down = nn.ModuleList([block(3, 8), block(8, 16)])
        self.middle = block(16, 16)
        self.up = nn.ModuleList([block(32, 8), block(16, 8)])
        self.head = nn.Conv2d(8, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for down in self.down:
            x = down(x)
            kept.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for up in self.up:
            x = up(torch.cat([F.interpolate(x, scale_factor=2.0), kept.pop()], 1))
        return self.head(x)


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.lstm = nn.LSTM(32, 32, 2, batch_first=True)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embedding(x))[0])


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(3 * 32 * 32, 32),
        nn.GELU(),
        nn.Linear(32, 32),
        nn.GELU(),
        nn.Linear(32, CLASSES),
    )


def _example(name: str, **settings: str) -> Callable[[], paceline.Job]:
    return lambda: load_job_file(str(EXAMPLES / f"{name}.py"), settings).job


ZOO: dict[str, Callable[[], paceline.Job]] = {
    "GPT-2": from_transformers(
        "GPT2LMHeadModel", "GPT2Config", next_tokens, _TEXT,
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32, **_DECODER,
    ),
    "Llama (grouped queries)": _text("Llama", **_SIZES, num_key_value_heads=2, **_DECODER),
    "Qwen3": _text("Qwen3", **_SIZES, num_key_value_heads=2, head_dim=8, **_DECODER),
    "Gemma2": _text("Gemma2", **_SIZES, num_key_value_heads=2, head_dim=8, **_DECODER),
    "GPT-NeoX": _text("GPTNeoX", **_SIZES, **_DECODER),
    "Phi": _text("Phi", **_SIZES, **_DECODER),
    "OPT": _text(
        "OPT", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
        word_embed_proj_dim=32, max_position_embeddings=32, **_DECODER,
    ),
    "BLOOM": _text("Bloom", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **_DECODER),
    "Falcon": _text(
        "Falcon", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **_DECODER
    ),
    "Mixtral (experts)": _text(
        "Mixtral", **_SIZES, num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.0, **_DECODER
    ),
    "Mamba (state space)": from_transformers(
        "MambaForCausalLM", "MambaConfig", next_tokens, _TEXT,
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=4, use_cache=False,
    ),
    "BERT": _masked("Bert", **_SIZES),
    "RoBERTa": _masked("Roberta", **_SIZES),
    "DistilBERT": _masked(
        "DistilBert", vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=32
    ),
    "ALBERT (shared layers)": _masked("Albert", **_SIZES, embedding_size=16),
    "DeBERTa-v2": _masked(
        "DebertaV2", **_SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8
    ),
    "T5": from_transformers(
        "T5ForConditionalGeneration", "T5Config", next_tokens, _PAIRS,
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
        use_cache=False,
    ),
    "BART": from_transformers(
        "BartForConditionalGeneration", "BartConfig", next_tokens, _PAIRS, **_TWO_STACKS, max_position_embeddings=32
    ),
    "ViT": _picture(
        "ViT", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32,
        patch_size=8,
    ),
    "Swin": _picture(
        "Swin", image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4,
        drop_path_rate=0.0,
    ),
    "ConvNeXt": _picture("ConvNext", hidden_sizes=[16, 32], depths=[2, 2], num_stages=2),
    "ResNet": _picture("ResNet", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], layer_type="basic"),
    "Wav2Vec2 (CTC)": from_transformers(
        "Wav2Vec2ForCTC", "Wav2Vec2Config", ctc, {"input_values": sound, "target": letters}, **_SPEECH
    ),
    "Whisper": from_transformers(
        "WhisperForConditionalGeneration", "WhisperConfig", next_tokens,
        {"input_features": spectrum, "decoder_input_ids": tokens, "target": tokens},
        **_TWO_STACKS, num_mel_bins=8, max_source_positions=16, max_target_positions=16, pad_token_id=0,
        decoder_start_token_id=1,
    ),
    "nn.Transformer": lambda: make_job(TorchTransformer, next_tokens, x=tokens, target=tokens),
    "MLP": lambda: make_job(mlp, classes, x=image, target=label),
    "U-Net": lambda: make_job(UNet, pixels, x=image),
    "LSTM": lambda: make_job(LSTM, next_tokens, x=tokens, target=tokens),
    "examples/text.py": _example("text", size="small", batch_size="8"),
    "examples/image.py": _example("image", size="small"),
    "examples/speech.py": _example("speech", size="small"),
    "examples/driving.py": _example("driving", size="small"),
}  # fmt: skip
"""name -> what builds its job; transformers is loaded only by those that need it."""
