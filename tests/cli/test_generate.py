"""`dsv3 generate` and bench/decode.py from the outside."""

import importlib.util
import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv3_mtp.cli import command
from dsv3_mtp.cli.command import COMMANDS
from dsv3_mtp.data.tokenizer import recorded_encoder
from dsv3_mtp.decode.decoder import compiled
from dsv3_mtp.decode.generate import Acceptance, Generation, Settings, generate
from dsv3_mtp.hf import export_hf
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.runs.model import load_model
from tests.made_runs import write_text_run

BENCH = Path(__file__).resolve().parents[2] / "bench"
TINY = {"model.vocab_size": 260, "train.dtype": "float32"}


@pytest.fixture
def run_tool(monkeypatch, capsys):
    """run_tool("generate", "--prompt", ...) -> (exit code, stdout, stderr), in this process."""

    def run(name: str, *arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            if name in COMMANDS:
                code = command.run(name, arguments)
            else:
                monkeypatch.syspath_prepend(BENCH)  # as Python does for a script
                spec = importlib.util.spec_from_file_location(f"tool_{name}", BENCH / f"{name}.py")
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                monkeypatch.setattr(sys, "argv", [name, *arguments])
                code = module.main()
        except SystemExit as error:
            code = error.code
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def folder(make_tiny_config, tmp_path) -> str:
    return str(write_text_run(make_tiny_config(TINY), tmp_path)[0])


SHORT = ["--max-new-tokens", "6", "--ignore-eos"]


def test_speculative_text_is_plain_text_and_the_summary_says_so(run_tool, folder):
    plain = run_tool("generate", "--run", folder, "--prompt", "def", *SHORT)
    drafted = run_tool(
        "generate",
        "--run",
        folder,
        "--prompt",
        "def",
        "--speculative",
        "--draft-depth",
        "2",
        *SHORT,
    )
    assert plain[0] == drafted[0] == 0
    assert plain[1] == drafted[1] != "\n"
    pattern = r"6 tokens, [\d.,]+ tokens/s, [\d.]+ tokens per trunk forward, "
    pattern += r"\d+ of \d+ drafts accepted \(by position [\d.]+ [\d.]+ joint,"
    pattern += r" [\d.]+ [\d.]+ conditional\), [\d.]+x plain decoding, same tokens\n$"
    assert re.search(pattern, drafted[2])


@pytest.mark.slow
def test_compiled_steps_generate_the_same_text_and_few_graphs_serve_all_lengths(
    run_tool, folder, monkeypatch
):
    """Through a counting backend: no C++ compiler and no minutes. One graph for one token, one for
    two.
    """
    from torch._dynamo.testing import CompileCounter

    counters = []

    def compile_counted(function, **options):
        counters.append(CompileCounter())
        options["options"].pop("cpp_wrapper")  # for the C++ compiler only
        return original(function, backend=counters[-1], **options)

    original = torch.compile
    monkeypatch.setattr(torch, "compile", compile_counted)
    compiled.cache_clear()
    options = ["--run", folder, "--prompt-ids", "5 9 3 7", "--speculative", *SHORT]
    plain, fast = run_tool("generate", *options), run_tool("generate", *options, "--compile")
    compiled.cache_clear()
    assert plain[0] == fast[0] == 0, fast[2]
    assert plain[1] == fast[1] != "\n"
    assert "same tokens" in fast[2]
    assert [0 < counter.frame_count <= 2 for counter in counters] == [True, True]  # trunk, module


@pytest.mark.slow  # to import torch's compiler takes seconds
def test_graphs_of_one_kind_of_model_are_not_run_for_another(make_tiny_config, monkeypatch):
    """They are not checked against the weights: another configuration needs its own, other weights
    do not.
    """

    def compile_traced(function, *, options, **rest):
        functions.append(function)
        return original(
            function,
            backend="eager",
            options={"guard_filter_fn": options["guard_filter_fn"]},
            **rest,
        )

    original, functions = torch.compile, []
    monkeypatch.setattr(torch, "compile", compile_traced)
    compiled.cache_clear()
    for heads, seed in [(2, 0), (1, 0), (2, 1)]:
        config = make_tiny_config(
            {"model.num_hidden_layers": 1, "model.num_attention_heads": heads}
        )
        model = DeepseekV3MTP(config.model, config.mtp).requires_grad_(False).eval()
        model.init_weights(seed)
        plain, fast = (
            generate(model, [[5, 9]], Settings(max_new_tokens=4, compile=c)) for c in (False, True)
        )
        assert plain == fast
    compiled.cache_clear()
    assert len(functions) == 2


def in_a_terminal(run_tool, monkeypatch, *options: str) -> str:
    """What a real pseudo-terminal shows of stdout."""
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        assert run_tool("generate", *options)[0] == 0
    shown = os.read(master, 4096).decode().replace("\r\n", "\n")
    os.close(master)
    return shown


@pytest.fixture
def drafts_hit(folder, monkeypatch) -> None:
    """Every draft behind the prompt of token 5 is the token that the model takes."""
    from dsv3_mtp.heads.sequential import ChainDrafter

    text = generate(load_model(folder).model, [[5]], Settings(max_new_tokens=6)).tokens[0]

    def know_the_text(self, ids, last, count, sampler):  # m = last: t_0 is the prompt
        drafts = torch.tensor([(text + [0, 0])[last[0] : last[0] + count]])
        ids[0, last[0] + 1 : last[0] + 1 + count] = drafts
        return drafts, None

    monkeypatch.setattr(ChainDrafter, "draft", know_the_text)
    monkeypatch.setattr(ChainDrafter, "drafting", lambda self: None)  # C would not ask `draft`


@pytest.mark.usefixtures("drafts_hit")
def test_accepted_drafts_are_green_in_a_terminal_and_in_quotes_elsewhere(
    run_tool, folder, monkeypatch
):
    """Without its marks the text is the same, and in a terminal it stands behind the prompt."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    options = ["--run", folder, "--prompt-ids", "5", "--speculative", "--draft-depth", "2", *SHORT]
    _, plain, said = run_tool("generate", *options)
    assert not re.search("[\x1b«]", plain) and "3 of 3 drafts accepted" in said
    show = [*options, "--show-drafts"]
    _, piped, said = run_tool("generate", *show)
    # token 1 from the prefill, then 2 drafts and 1 free, then 1 draft and 1 free
    assert "\x1b" not in piped and piped.count("«") == piped.count("»") == 3
    assert re.sub("[«»]", "", piped) == plain and "« »: accepted drafts\n" in said
    shown = in_a_terminal(run_tool, monkeypatch, *show)
    assert re.findall("\x1b\\[32m(.*?)\x1b\\[0m", shown, re.DOTALL) == re.findall(
        "«(.*?)»", piped, re.DOTALL
    )
    prompt = recorded_encoder(load_model(folder).tokenizer, 10**6).tokenizer.decode([5])
    assert re.sub("\x1b\\[\\d+m", "", shown) == prompt + plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert in_a_terminal(run_tool, monkeypatch, *show) == piped


def test_distinct_tokens_are_counted_among_64_in_a_row():
    """A long text has fewer distinct tokens of all, whether it repeats itself or not."""
    row = list(range(64))
    counts = Acceptance()
    assert Generation([row * 4, [7] * 64], counts).distinct == (1 + 1 / 64) / 2
    assert Generation([[*row, 1, 1]], counts).distinct == 65 / 66


def test_an_export_generates_the_text_of_its_run(run_tool, folder, tmp_path):
    export_hf(folder, tmp_path / "hf", dtype="fp32")
    options = ["--prompt-ids", "5 9 3", "--speculative", "--draft-depth", "2", *SHORT]
    from_run = run_tool("generate", "--run", folder, *options)
    from_export = run_tool("generate", "--hf", str(tmp_path / "hf"), *options)
    assert from_run[0] == from_export[0] == 0, from_export[2]
    assert from_run[1] == from_export[1]
    assert run_tool("generate", "--hf", str(tmp_path / "none"), *options)[0] == 2


def test_prompts_come_from_options_files_ids_and_stdin(run_tool, folder, tmp_path):
    (tmp_path / "prompt.txt").write_text("class")
    ids = "5 9, 3"
    options = [
        "--prompt",
        "def",
        "--prompt-file",
        str(tmp_path / "prompt.txt"),
        "--prompt-ids",
        ids,
    ]
    code, out, _ = run_tool("generate", "--run", folder, *options, *SHORT)
    assert code == 0
    assert re.findall(r"^--- (.*)$", out, re.MULTILINE) == [
        "prompt 'def'",
        str(tmp_path / "prompt.txt"),
        f"prompt ids {ids}",
    ]
    alone = run_tool("generate", "--run", folder, *SHORT, stdin="class")
    assert alone[0] == 0
    assert alone[1] in out


def test_generation_stops_at_the_given_token(run_tool, folder):
    whole = generate(load_model(folder).model, [[5]], Settings(max_new_tokens=6)).tokens[0]
    count = whole.index(whole[2]) + 1
    code, _, err = run_tool(
        "generate", "--run", folder, "--prompt-ids", "5", "--stop", str(whole[2]), *SHORT
    )
    assert code == 0, err
    assert err.startswith(f"{count} tokens")


def test_a_text_that_ends_with_the_context_says_so(run_tool, folder):
    options = ("--prompt-ids", "5 6", "--ignore-eos", "--max-new-tokens")
    long, exact = (
        run_tool("generate", "--run", folder, *options, count) for count in ("500", "14")
    )
    assert long[0] == exact[0] == 0 and long[1] == exact[1]
    assert (
        "note: prompt ids 5 6 ends where the model does, after 16 tokens" in long[2]
        and "note" not in exact[2]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x" * 16], "max_position_embeddings = 16"),
        (["--prompt-ids", "1 260"], "outside the vocabulary of 260: 260"),
        (["--prompt-ids", "one"], "must be whole numbers"),
        (["--prompt-file", "gone.txt"], "--prompt-file gone.txt: No such file"),
        (["--prompt", "a", "--stop", "gone"], "--stop 'gone': not one token"),
        (["--prompt", "a", "--top-p", "0.5"], "no effect at temperature 0"),
        (["--prompt", "a", "--device", "abacus"], "--device abacus:"),
        (["--prompt", "a", "--speculative", "--draft-vocab", "261"], "--draft-vocab 261: a draft"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_input_is_one_sentence_and_exit_code_2(run_tool, folder, arguments, message):
    code, out, err = run_tool("generate", "--run", folder, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_missing_checkpoint_and_a_model_without_heads_are_refused(
    run_tool, make_tiny_config, tmp_path
):
    for tool in ("generate", "decode"):
        code, _, err = run_tool(tool, "--run", str(tmp_path / "gone"), "--prompt", "a")
        assert (code, err.count("\n")) == (2, 1)
        assert "no config.yaml there" in err
    folder, _ = write_text_run(make_tiny_config(TINY | {"mtp.mode": "none"}), tmp_path)
    code, _, err = run_tool("generate", "--run", str(folder), "--prompt", "a", "--speculative")
    assert (code, err.count("\n")) == (2, 1)
    assert "no MTP heads" in err


def test_independent_heads_say_how_many_tokens_they_draft(run_tool, make_tiny_config, tmp_path):
    folder, _ = write_text_run(make_tiny_config(TINY | {"mtp.mode": "parallel"}), tmp_path)
    code, _, err = run_tool(
        "generate",
        "--run",
        str(folder),
        "--prompt",
        "a",
        "--speculative",
        "--draft-depth",
        "3",
        *SHORT,
    )
    assert code == 0
    assert "--draft-depth 3 drafts 1" in err
    pytest.importorskip("transformers", reason="the hf extra is not installed")
    short = ["--new-tokens", "4", "--rounds", "1", "--depths", "1", "3"]
    code, out, err = run_tool("decode", "--run", str(folder), *short)
    assert code == 0, err
    assert "not run: K=3; independent heads draft at most D = 1 tokens" in out


def test_the_benchmark_prints_its_tables(run_tool, folder):
    pytest.importorskip("transformers", reason="the hf extra is not installed")
    options = ["--prompt", "def", "--new-tokens", "8", "--rounds", "1", "--depths", "1", "2"]
    code, out, err = run_tool("decode", "--run", folder, *options)
    assert code == 0, err
    assert "OTHER TOKENS" not in out
    assert [line.split("  ")[0] for line in out.splitlines()[3:6]] == [
        "transformers generate()",
        "plain",
        "K=1",
    ]
    assert "break-even K=2" in out and "batch 16: a plain step takes" in out
    code, _, err = run_tool("decode", "--run", folder, *options, "--hf-mtp", f"{folder}/gone")
    assert (code, err.count("\n")) == (2, 1)
    assert "gone/config.json: cannot be read" in err
    for wrong in (["--prompt", "def"], ["--run", folder, "--prompt-tokens", "8"]):
        code, _, err = run_tool("decode", *wrong)
        assert code == 2 and "no effect with" in err


@pytest.mark.parametrize("name", ["generate", "decode"])
def test_help_needs_no_torch(name, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{BENCH.parent}"}
    folder = BENCH if name == "decode" else BENCH.parent / "tools"
    command = [sys.executable, str(folder / f"{name}.py"), "--help"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert "--run" in run.stdout


def test_decoding_stops_at_the_end_of_text_that_the_data_was_made_with(run_tool, folder):
    data = Path(folder).parents[1] / "data/tiny"
    model = load_model(folder).model
    token = generate(model, [[5, 9, 3]], Settings(max_new_tokens=1)).tokens[0][0]
    (data / "index.json").write_text(f'{{"eos_id": {token}}}')
    code, _, err = run_tool("generate", "--run", folder, "--prompt-ids", "5 9 3")
    assert (code, err) == (0, "1 tokens, all from the prefill\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "def \udcff"], "error: prompt 'def \\udcff': not UTF-8 text"),
        (
            ["--prompt", "def", "--stop", "260"],
            "error: --stop '260': not one token of the vocabulary, nor an id",
        ),
    ],
)
def test_what_is_no_text_or_no_token_is_refused(run_tool, folder, options, message):
    code, out, err = run_tool("generate", "--run", folder, *options)
    assert (code, out) == (2, "")
    assert message in err


def test_a_full_disk_is_one_line(run_tool, folder, monkeypatch):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    code, _, err = run_tool("generate", "--run", folder, "--prompt", "def", *SHORT)
    assert (code, err) == (2, "error: No space left on device\n")
