"""Imported once, by the process that ranks and quick programs are forks of: what each of them would begin with.

The libraries, and what they compute once a process. The garbage collector then leaves all of it alone: it would look at
half a million objects again in each fork, and copy their memory by doing so.
"""

import gc
import io

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import fitune.training.train  # noqa: F401
from fitune.data.chat_renderer import ChatRenderer
from fitune.data.chat_template import training_template
from fitune.data.piece_pattern import piece_pattern
from fitune.demo.tiny_base import SPLIT_PATTERN


def _make_an_adapter() -> None:
    """PEFT compiles the patterns of every architecture's names."""
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    with torch.device("meta"):
        get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules="all-linear"))


def _draw_a_curve() -> None:
    """matplotlib looks for its fonts."""
    figure = Figure()
    figure.add_subplot().plot([1, 2], [1, 2])
    FigureCanvasAgg(figure).print_png(io.BytesIO())


def _read_a_conversation() -> None:
    """Jinja compiles the template, and the tokenizer's pattern asks for all of Unicode's letters."""
    ChatRenderer(training_template("llama3"), {})
    piece_pattern(SPLIT_PATTERN)


_make_an_adapter()
_draw_a_curve()
_read_a_conversation()
gc.collect()
gc.freeze()
