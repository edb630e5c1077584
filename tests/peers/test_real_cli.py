"""The command line on transformers models: runs in process on a small checkpoint with a tokenizer of its own, a real kill, one line for each bad input."""

import json
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from matplotlib.figure import Figure

import minilora as ml
from minilora import plots
from minilora.__main__ import main
from minilora.methods import METHODS, RATES
from minilora.training import next_byte_loss

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

transformers.utils.logging.disable_progress_bar()

from minilora.scale.loading import load_model, load_tokenizer
from minilora.scale.saving import densify
from minilora.scale.text import Speaker, nats_per_token, token_text

WORDS = "".join(f"The quick brown fox jumps over the lazy dog, number {i}. " for i in range(60)) + "Und 狐狸 springt über den faulen Hund. " * 5
SIZES = dict(vocab_size=300, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3,
             max_position_embeddings=128)
KINDS = {"llama": ("LlamaForCausalLM", SIZES), "qwen2": ("Qwen2ForCausalLM", SIZES | {"tie_word_embeddings": True}),
         "mixtral": ("MixtralForCausalLM", SIZES | {"num_local_experts": 4}),
         "gpt2": ("GPT2LMHeadModel", dict(vocab_size=300, n_positions=128, n_embd=24, n_layer=2, n_head=3))}

SHORT = ["--rank", "2", "--steps", "4", "--context", "16", "--lr", "0.01"]


def checkpoint(folder, kind="llama", begins=False, dtype=torch.float32):
    """A model and a byte-level tokenizer, as the hub has them; `begins`: it puts <s> before every text, as Llama's does."""
    torch.manual_seed(0)
    cls, sizes = KINDS[kind]
    model = getattr(transformers, cls)(getattr(transformers, cls).config_class(**sizes)).to(dtype)
    model.generation_config.eos_token_id = None                       # so that samples have the length that was asked for
    model.save_pretrained(folder)
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    made.train_from_iterator([WORDS], tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>"], show_progress=False))
    if begins:
        made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>").save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    (tmp_path / "fox.txt").write_text(WORDS, encoding="utf-8")
    return tmp_path / "fox.txt"


@pytest.fixture
def model(tmp_path):
    return checkpoint(tmp_path / "model")


@pytest.fixture
def finetune(tmp_path, text, model, capsys, monkeypatch):
    """finetune(--flag, value, …) -> (exit code, stdout, stderr, DIR), in process. The picture is small."""
    monkeypatch.setattr(plots, "loss_curve", lambda *_: Figure(figsize=(1, 1)))

    def run(*flags, out=tmp_path / "out", model=model):
        words = ["finetune", "--model", str(model), "--text", str(text), *SHORT, "--out", str(out), *flags]
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err, out

    return run


def files(folder):
    return sorted(path.name for path in folder.iterdir())


FINISHED = ["adapter_config.json", "adapter_model.safetensors", "history.json", "loss.png"]


def interrupted(finetune, monkeypatch, step, *flags, **where):
    """A run in which Ctrl-C comes in that step."""
    clear, cleared = torch.optim.AdamW.zero_grad, []

    def stop(self):
        cleared.append(1)
        if len(cleared) == step:
            raise KeyboardInterrupt
        clear(self)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "zero_grad", stop)
        return finetune(*flags, **where)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind, method", [("llama", "lora"), ("llama", "loftq"), ("qwen2", "qlora"), ("gpt2", "qlora"), ("mixtral", "qlora")])
def test_a_run_stopped_goes_on_speaks_and_merges(finetune, monkeypatch, tmp_path, capsys, kind, method):
    """Stopped in its third step, the same command ends with the bytes of a run that was not stopped; the merged folder says what the adapter said.
    In qwen2 most layers are in four bits and have no adapter."""
    base = checkpoint(tmp_path / kind, kind)
    flags = ("--method", method, *(("--targets", "q_proj,down_proj") if kind == "qwen2" else ()))
    code, out, _, straight = finetune(*flags, out=tmp_path / "straight", model=base)
    assert code == 0 and files(straight) == FINISHED
    for said in ("before:", "after:", "bits per byte", "parameters trained", "bytes held out, which are", "of them seen in training"):
        assert said in out
    assert interrupted(finetune, monkeypatch, 3, *flags, model=base)[0] == 130 and files(tmp_path / "out") == ["checkpoint.pt"]
    code, out, _, folder = finetune(*flags, model=base)
    assert code == 0 and "resumed at step 2" in out
    assert all((folder / name).read_bytes() == (straight / name).read_bytes() for name in FINISHED[:3])

    merged, said = tmp_path / "merged", []
    for words in (["--model", str(base), "--adapter", str(folder)], ["--model", str(merged)]):
        if said:
            assert main(["merge", "--model", str(base), "--adapter", str(folder), "--out", str(merged)]) == 0
            assert main(["merge", "--model", str(base), "--adapter", str(folder), "--out", str(merged)]) == 2
            assert f"{merged} exists already" in capsys.readouterr().err
            assert main(["merge", "--model", str(base), "--adapter", str(folder), "--out", str(merged), "--force"]) == 0
            capsys.readouterr()
        assert main(["generate", *words, "--prompt", "The quick", "--max-new", "9", "--temperature", "0"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].startswith("The quick")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(merged)                # and transformers alone reads it
    ids = torch.arange(32).view(2, 16)
    adapted = load_model(base, four_bits=method == "qlora")
    assert torch.allclose(theirs(ids).logits, ml.load_adapter(adapted, folder)(ids).logits, atol=1e-5)
    assert not torch.allclose(theirs(ids).logits, transformers.AutoModelForCausalLM.from_pretrained(base)(ids).logits, atol=1e-3)


@pytest.mark.parametrize("kind, flags", [("llama", ()), ("qwen2", ("--method", "qlora", "--targets", "q_proj,down_proj")), ("gpt2", ())])
def test_a_merge_into_float32_keeps_what_16_bits_swallow(finetune, tmp_path, capsys, kind, flags):
    """On a bf16 base. In qwen2 some layers are in four bits and have no adapter: they are written in float32, too."""
    base = checkpoint(tmp_path / kind, kind, dtype=torch.bfloat16)
    _, _, _, folder = finetune(*flags, "--lr", "1e-4", model=base)
    command, ids = ["merge", "--model", str(base), "--adapter", str(folder)], torch.arange(32).view(2, 16)
    for name, words in (("own", []), ("wide", ["--dtype", "fp32"])):
        assert main([*command, "--out", str(tmp_path / name), *words]) == 0
    own, wide = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto") for name in ("own", "wide"))
    assert {p.dtype for p in own.parameters()} == {torch.bfloat16} and {p.dtype for p in wide.parameters()} == {torch.float32}
    assert {tensor.dtype for tensor in safetensors.torch.load_file(tmp_path / "wide" / "model.safetensors").values()} == {torch.float32}
    right = densify(ml.load_adapter(load_model(base, four_bits=bool(flags)), folder)).float()(ids).logits      # four bits as they compute, in bf16
    lost, kept = ((model.float()(ids).logits - right).abs().max() for model in (own, wide))
    assert kept < 1e-5 and lost > 50 * kept
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    capsys.readouterr()
    assert main(["merge", "--adapter", str(folder), "--out", str(tmp_path / "x"), "--dtype", "bf16"]) == 2
    assert "--dtype bf16 is for a --model" in capsys.readouterr().err


def test_what_is_written_is_what_was_trained(finetune, model, text):
    _, _, _, folder = finetune()
    history = json.loads((folder / "history.json").read_text())
    assert len(history["loss"]) == 4 and [step for step, _ in history["evaluated"]] == [0, 4]
    assert [history[key] for key in ("task", "method", "model", "context")] == ["fox.txt", "lora", str(model), 16]
    read = token_text(text.read_bytes(), "fox.txt", load_tokenizer(model))
    assert history["tokens_per_byte"] == len(read.rest) / read.size
    adapted = ml.load_adapter(load_model(model), folder)
    for stage, loaded, nats in (("before", load_model(model), history["evaluated"][0][1]), ("after", adapted, history["evaluated"][-1][1])):
        assert read.nats_per_byte(loaded, read.held_out(16)) / math.log(2) == pytest.approx(history[stage]["bits_per_byte"], rel=1e-6)
        assert nats == pytest.approx(history[stage]["bits_per_byte"] * math.log(2), rel=1e-6)
    first = next_byte_loss(load_model(model), *read.batches(4, 16)(0)).item()
    assert history["loss"][0] == pytest.approx(first, rel=1e-5)                       # B = 0: the first loss is the base's
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model)


def test_an_adapter_is_no_model(finetune, capsys):
    assert main(["generate", "--model", str(finetune()[3])]) == 2
    assert capsys.readouterr().err.endswith("is an adapter: name the model that it was made for, and this as the adapter\n")


@pytest.mark.parametrize("rows, at_once", [("2", 2), ("9", 8)])
def test_fewer_rows_need_less_memory_when_the_text_is_scored_too(finetune, monkeypatch, rows, at_once):
    seen, plain = [], nats_per_token
    monkeypatch.setattr("minilora.scale.text.nats_per_token", lambda model, windows, rows: seen.append(rows) or plain(model, windows, rows))
    assert finetune("--rows", rows)[0] == 0 and set(seen) == {at_once}


def test_peft_reads_the_adapter_on_transformers_own_model(finetune, model):
    peft = pytest.importorskip("peft")
    folder = finetune()[3]
    ids = torch.arange(32).view(2, 16)
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(model), folder)
    assert torch.allclose(theirs(ids).logits, ml.load_adapter(load_model(model), folder)(ids).logits, atol=1e-5)


def test_full_fine_tuning_leaves_a_folder_that_speaks(finetune, model, tmp_path, capsys, monkeypatch):
    """Of a 16-bit checkpoint it trains, and writes, 32 bits: in 16 most steps of Adam's would be lost."""
    base = checkpoint(tmp_path / "bf16", "qwen2", dtype=torch.bfloat16)
    flags = ("--method", "full")
    straight = finetune(*flags, out=tmp_path / "straight", model=base)[3]
    assert files(straight) == ["history.json", "loss.png", "model"]
    assert interrupted(finetune, monkeypatch, 3, *flags, model=base)[0] == 130
    code, out, _, folder = finetune(*flags, model=base)
    assert code == 0 and "resumed at step 2" in out and files(folder) == files(straight)
    assert all((folder / "model" / name).read_bytes() == (straight / "model" / name).read_bytes() for name in files(straight / "model"))
    trained = load_model(folder / "model")
    assert next(trained.parameters()).dtype == torch.float32 and not torch.equal(trained.lm_head.weight, load_model(base).lm_head.weight.float())
    said = []
    for words in (["--model", str(folder / "model")], ["--model", str(base), "--adapter", str(folder)], ["--model", str(base)]):
        assert main(["generate", *words, "--prompt", "The", "--max-new", "9", "--seed", "3"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2] and said[0].startswith("The")
    assert main(["merge", "--model", str(base), "--adapter", str(folder), "--out", str(tmp_path / "merged")]) == 2
    assert "holds a whole model, fully fine-tuned, and no adapter" in capsys.readouterr().err
    assert main(["doctor", str(folder / "model"), "--base", str(folder)]) == 0       # of a run, the model that it left
    for words, says in ((["--model", str(folder)], f"is a run, which has left a model in it: name {folder / 'model'}"),
                        (["--adapter", str(folder)], f"holds a real model, fully fine-tuned: `--model {folder / 'model'}`")):
        assert main(["generate", *words]) == 2 and says in capsys.readouterr().err
    code, _, err, _ = finetune(*flags, model=base)
    assert code == 2 and "finished run" in err
    (folder / ".model.tmp").mkdir()                                                  # of a run that was killed
    assert finetune("--force", model=base)[0] == 0 and sorted(os.listdir(folder)) == FINISHED


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX has them")
def test_killed_in_mid_run_the_same_command_ends_with_the_same_bytes(finetune, model, text, tmp_path):
    """What is killed (SIGKILL: no handler runs) is a process of its own; what is not, runs here."""
    flags = ["--method", "qlora", "--steps", "40", "--rows", "2"]
    straight = finetune(*flags, out=tmp_path / "straight")[3]
    words = ["finetune", "--model", str(model), "--text", str(text), *SHORT, "--out", str(tmp_path / "out"), *flags]
    # after its ninth step it waits, so that the kill finds it there on every machine
    waits = ("import sys, time, torch\nfrom minilora.__main__ import main\nclear, count = torch.optim.AdamW.zero_grad, []\n"
             "def slow(self):\n    count.append(1)\n    len(count) > 9 and (print('here', flush=True), time.sleep(600))\n    clear(self)\n"
             "torch.optim.AdamW.zero_grad = slow\nmain(sys.argv[1:])")
    killed = subprocess.Popen([sys.executable, "-c", waits, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
    while killed.stdout.readline() not in ("here\n", ""):
        pass
    killed.kill()
    assert killed.wait() == -signal.SIGKILL and "checkpoint.pt" in files(tmp_path / "out")
    code, out, _, folder = finetune(*flags)
    assert code == 0 and re.search(r"resumed at step [1-9]\n", out) and files(folder) == FINISHED
    assert all((folder / name).read_bytes() == (straight / name).read_bytes() for name in FINISHED[:3])


def test_a_finished_run_is_refused_without_force_before_the_model_is_loaded(finetune, monkeypatch):
    folder = finetune()[3]
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    with monkeypatch.context() as patch:
        patch.setattr("minilora.scale.loading.load_model", lambda *_, **__: pytest.fail("loaded"))
        code, _, err, _ = finetune()
    assert code == 2 and "finished run" in err and err.count("\n") == 1
    assert finetune("--force", "--targets", "query")[0] == 2                          # what is refused replaces nothing
    assert before == {name: (folder / name).read_bytes() for name in files(folder)}
    assert finetune("--force", "--seed", "3")[0] == 0 and before[FINISHED[1]] != (folder / FINISHED[1]).read_bytes()


def test_rows_context_and_rate_are_used(finetune, model, tmp_path):
    plain = json.loads((finetune(out=tmp_path / "plain")[3] / "history.json").read_text())
    for flags in (["--rows", "8"], ["--context", "8"]):
        other = json.loads((finetune(*flags, out=tmp_path / flags[0])[3] / "history.json").read_text())
        assert other["loss"][0] != plain["loss"][0]
    code = main(["finetune", "--model", str(model), "--text", str(tmp_path / "fox.txt"), "--steps", "1", "--out", str(tmp_path / "usual")])
    usual = json.loads((tmp_path / "usual" / "history.json").read_text())
    assert code == 0 and usual["context"] == 128 and usual["lr"] == [RATES["lora"] / 50] == [2e-4]


BAD = [
    (["--context", "200"], "--context 200: this model reads at most 128"), (["--context", "1"], "context"), (["--rows", "0"], "rows"),
    (["--targets", "query"], "no Linear matches 'query'.*q_proj"), (["--rank", "41"], "rank 41 is above"), (["--base", "x"], "not allowed with"),
    (["--method", "full", "--targets", "q_proj"], "takes no targets"), (["--model", "{tmp}/nowhere"], "nowhere: no such folder"),
    (["--model", "{tmp}/empty"], "empty holds no tokenizer"), (["--steps", "0"], "steps"),
    (["--text", "{tmp}/none.txt"], "none.txt: cannot be read"), (["--model", "{tmp}/mute"], r"holds no tokenizer \(tokenizer.json\)"),
    (["--model", "{tmp}/few"], "its tokenizer gives the token \\d+, and the model knows 290: they do not belong together"),
]


@pytest.mark.parametrize("flags, says", BAD, ids=[" ".join(flags[:2]) for flags, _ in BAD])
def test_bad_input_is_one_clear_line_and_leaves_nothing_behind(finetune, model, tmp_path, flags, says):
    (tmp_path / "empty").mkdir()
    if "mute" in flags[1]:
        (checkpoint(tmp_path / "mute") / "tokenizer.json").unlink()
    if "few" in flags[1]:
        checkpoint(tmp_path / "few")
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | {"vocab_size": 290})).save_pretrained(tmp_path / "few")
    code, _, err, _ = finetune(*(flag.format(tmp=tmp_path) for flag in flags), out=tmp_path / "a" / "out")
    assert code == 2 and err.count("\n") == 1 and re.search(says, err), err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("words, says", [
    (["finetune", "--model", "{model}", "--task", "voice", "--out", "{tmp}/a"], "--task voice is made for the shipped base, which reads bytes; with"),
    (["finetune", "--model", "{model}", "--out", "{tmp}/a"], "required"), (["finetune", "--model", "", "--text", "{tmp}/fox.txt"], "must not be empty"),
    (["generate", "--base", "{model}"], "is a folder, and a TinyGPT is a file; a transformers model is named by --model"),
    (["finetune", "--text", "{tmp}/fox.txt", "--context", "200", "--out", "{tmp}/a"], "--context 200: this model reads at most 128"),
    (["generate", "--model", "{model}", "--adapter", "{tmp}/nowhere"], "adapter_model.safetensors: no such file"),
    (["generate", "--model", "{model}", "--max-new", "200"], "1 tokens of prompt and 200 new ones are more than the 128 that this model reads"),
    (["generate", "--model", "{model}", "--base", "x"], "not allowed with"),
    (["merge", "--model", "{model}", "--adapter", "{tmp}/nowhere", "--out", "{tmp}/a"], "adapter_model.safetensors: no such file"),
    (["merge", "--model", "{model}", "--adapter", "{tmp}/nowhere", "--out", "{tmp}", "--force"], r"holds other things than a model \(model\)"),
    (["merge", "--model", "{model}", "--adapter", "{tmp}/nowhere", "--out", "{tmp}/fox.txt", "--force"], "is a file; a real model is written as a folder"),
])
def test_other_commands_refuse_in_one_line_too(model, text, tmp_path, capsys, words, says):
    try:
        code = main([word.format(tmp=tmp_path, model=model) for word in words])
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and re.search(says, err), err
    assert files(tmp_path) == ["fox.txt", "model"]


def test_without_transformers_it_is_one_line(finetune, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err, folder = finetune()
    assert code == 2 and "pip install 'transformers>=5' tokenizers" in err and err.count("\n") == 1 and not folder.exists()


class Uniform(torch.nn.Module):
    """Gives the next token t + 1 the logit t + 1, whatever came before, but what stands at the first place of its input a large one."""

    def __init__(self, symbols):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.linspace(-1, 1, symbols))

    def forward(self, ids):
        return self.logits.expand(*ids.shape, -1) + 5.0 * torch.nn.functional.one_hot(ids[:, :1], len(self.logits))


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("context", [7, 16, 61, 300])
def test_bits_per_byte_are_all_the_nats_over_all_the_bytes(tmp_path, context, begins):
    """Against a sum by hand, in float64: each held-out token once, the short window at the end too, given what stands before its window."""
    tokenizer = load_tokenizer(checkpoint(tmp_path / "model", begins=begins))
    read = token_text(WORDS.encode(), "fox", tokenizer)
    train, rest = ml.data.nine_tenths(WORDS.encode())
    ids = tokenizer(rest.decode(), add_special_tokens=False).input_ids
    assert read.rest.tolist() == ids and read.size == len(rest) and read.train.tolist() == tokenizer(train.decode(), add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == rest.decode()                                     # no byte of the text is lost
    model, nats = Uniform(300), 0.0
    for i, token in enumerate(ids):
        before = tokenizer.bos_token_id if begins else ([read.train[-1].item()] + ids)[i // context * context]
        logits = model.logits.double() + 5.0 * torch.nn.functional.one_hot(torch.tensor(before), 300)
        nats -= logits.log_softmax(-1)[token].item()
    windows = read.held_out(context)
    assert int((windows[:, 1:] != -100).sum()) == len(ids)
    assert read.nats_per_byte(model, windows, rows=3) == pytest.approx(nats / len(rest), rel=1e-5)
    assert nats_per_token(model, windows) == pytest.approx(nats / len(ids), rel=1e-5)


def test_of_a_long_text_windows_are_spread_evenly(tmp_path):
    tokenizer = load_tokenizer(checkpoint(tmp_path / "model"))
    read = token_text(WORDS.encode() * 40, "long", tokenizer)
    windows = read.held_out(7)
    fit = -(-len(read.rest) // 7)
    assert len(windows) == 128 < fit
    ids = torch.cat([read.train[-1:], read.rest])
    starts = [i * fit // 128 * 7 for i in range(128)]
    assert all(windows[i].tolist() == ids[start:start + 8].tolist() for i, start in enumerate(starts)) and starts[-1] > 7 * (fit - fit // 64)
    model = Uniform(300)
    assert read.nats_per_byte(model, windows) == pytest.approx(nats_per_token(model, windows) * len(read.rest) / read.size)


@pytest.mark.parametrize("begins", [False, True])
def test_batches_are_a_pure_function_of_the_step(tmp_path, begins):
    tokenizer = load_tokenizer(checkpoint(tmp_path / "model", begins=begins))
    read = token_text(WORDS.encode(), "fox", tokenizer)
    batches = read.batches(5, 12, seed=3)
    x, y = batches(7)
    again = read.batches(5, 12, seed=3)(7)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and x.shape == y.shape == (5, 12) and torch.equal(x[:, 1:], y[:, :-1])
    others = (batches(8), read.batches(5, 12, seed=4)(7))
    assert not any(torch.equal(y, other[1]) for other in others)
    assert ((x[:, 0] == tokenizer.bos_token_id).all().item()) == begins
    where = read.train.unfold(0, 12, 1)                                               # every window of the training part
    assert all((where == row).all(-1).any() for row in y)
    edge = read.batches(400, len(read.train) - 2)                                     # two places where a window may begin
    assert {row[-1].item() for row in edge(0)[1]} == {read.train[-1].item(), read.train[-2].item()}
    with pytest.raises(ValueError, match=rf"fox: {len(read.train)} tokens to train on, and a window needs {len(read.train) + 1}: a longer text, or a"):
        read.batches(1, len(read.train))
    assert read.batches(1, 12).fingerprint != token_text(WORDS.encode() + b"!", "fox", tokenizer).fingerprint


@pytest.mark.parametrize("begins", [False, True])
def test_a_speaker_continues_as_its_model_would(tmp_path, begins):
    """Greedily: against a loop without a cache. Sampled: repeatable, and no one's random numbers are spent."""
    checkpoint(tmp_path / "model", begins=begins)
    speaker = Speaker(load_model(tmp_path / "model").train(), load_tokenizer(tmp_path / "model"))
    ids = speaker.tokenizer("The quick").input_ids
    with torch.no_grad():
        for _ in range(12):
            ids.append(speaker.model.eval()(torch.tensor([ids])).logits[0, -1].argmax().item())
    speaker.model.train()
    assert speaker.generate("The quick", 12) == speaker.tokenizer.decode(ids, skip_special_tokens=True) and speaker.model.training
    before = torch.get_rng_state()
    said = [speaker.generate("The quick", 12, 0.9, seed) for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2] and torch.equal(before, torch.get_rng_state())
    assert speaker.generate("", 5, 0.9, 1) and not speaker.generate("", 5, 0.9, 1).startswith("<s>")
    speaker.tokenizer.bos_token = None
    if not begins:
        with pytest.raises(ValueError, match="no token that begins a text: give a prompt"):
            speaker.generate("", 5)


def test_every_method_has_a_rate_for_real_models():
    assert {*RATES} == {*METHODS}
