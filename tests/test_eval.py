"""eval.py gives the perplexity of transformers, and the answers that lm_eval's own class for Hugging Face gives."""

import functools
import json
import sys
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import transformers as hf

import eval
from cli.script import run_script
from engine.sampling_params import SamplingParams
from evaluation import lm_harness
from evaluation.lm_harness import harness_model, task_text
from evaluation.scoring import ScoredSequence, compute_scores
from loading import load_model
from tests.tiny import convert, write_folder
from text.tokenizer import load_tokenizer
from utils.errors import UsageError

TEXT = "Ein Männlein steht im Walde ganz still und stumm, es hat von lauter Purpur ein Mäntlein um. " * 4
QUESTIONS = [
    {"question": "The sky is", "choices": [" blue", " made of stone", " é"], "answer": 0, "chat": "Colour?"},
    {"question": "Two and two are ", "choices": ["four", "five"], "answer": 0, "chat": "Sum?"},
    {"question": "", "choices": ["Yes, it is", "No"], "answer": 1, "chat": "<s> or not?"},
    {"question": "x" * 300, "choices": [" y", " yyyyyyyyyyyyyyyy"], "answer": 1, "chat": "Long?"},
    {"question": "<s>Once upon a", "choices": [" time", " hill"], "answer": 0, "chat": "Story?"},
]
TASKS = {
    "local_choice": "multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
    "doc_to_target: '{{answer}}'\nmetric_list: [{metric: acc}]",
    "local_text": "loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: 'A{{question}}.'\n"
    "metric_list: [{metric: word_perplexity}]",
    "local_answer": "generate_until\ndoc_to_text: '{{chat}} {{question}}'\ndoc_to_target: '{{choices[0]}}'\n"
    "generation_kwargs: {until: ['e', 'zz'], max_gen_toks: 20}\nmetric_list: [{metric: exact_match}]",
}


@pytest.fixture(scope="module", params=[False, True], ids=["", "bos"])
def folder(request, tmp_path_factory):
    """The folder of a model with a context of 256, its tokenizer (with or without a beginning-of-sequence token) and
    local tasks."""
    folder = tmp_path_factory.mktemp("model")
    write_folder("llama3", folder)
    if request.param:
        tok = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        tok.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
        tok.save(str(folder / "tokenizer.json"))
    convert(folder)
    write_tasks(folder)
    return folder


def write_tasks(folder):
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (folder / "tasks").mkdir()
    for name, rest in TASKS.items():
        data = f"{{data_files: {{test: {folder / 'q.jsonl'}}}, cache_dir: {folder / 'cache'}}}"
        text = f"task: {name}\ndataset_path: json\ndataset_kwargs: {data}\ntest_split: test\noutput_type: {rest}\n"
        (folder / "tasks" / f"{name}.yaml").write_text(text)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    """Stops lm_eval from listing every installed package, which takes longer than its tasks here."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def ours(folder):
    """(model, tokenizer)"""
    return load_model(folder / "model.pth", "cpu", torch.float32), load_tokenizer(folder)


def run_eval(monkeypatch, capsys, folder, *args: str) -> str:
    command = ["eval.py", f"--checkpoint_path={folder / 'model.pth'}", "--device=cpu", "--precision=float32", *args]
    monkeypatch.setattr(sys, "argv", command)
    capsys.readouterr()
    eval.main()
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def theirs(folder):
    """(model, tokenizer) of transformers"""
    return hf.AutoModelForCausalLM.from_pretrained(folder), hf.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("length", [2, 50, 256])
def test_perplexity_equals_transformers(length, batch_size, folder, theirs, monkeypatch, capsys):
    args = [f"--text_file={folder / 'text.txt'}", f"--max_seq_length={length}", f"--batch_size={batch_size}", "--json"]
    ours = json.loads(run_eval(monkeypatch, capsys, folder, *args))
    model, tok = theirs
    ids, bos = tok(TEXT, add_special_tokens=False).input_ids, tok("").input_ids
    nll = windows = tokens = 0
    for i in range(0, len(ids), length - len(bos)):
        window = torch.tensor([bos + ids[i : i + length - len(bos)]])
        if window.shape[1] > 1:
            with torch.inference_mode():
                logprobs = model(window).logits.double().log_softmax(-1)
            nll -= logprobs[0, :-1].gather(-1, window[0, 1:, None]).sum().item()
            windows, tokens = windows + 1, tokens + window.shape[1] - 1
    assert (ours["windows"], ours["tokens"]) == (windows, tokens)
    assert ours["nll_per_token"] == pytest.approx(nll / tokens, rel=1e-5)
    assert ours["perplexity"] == pytest.approx(torch.tensor(nll / tokens).exp().item(), rel=1e-4)


def test_score_does_not_depend_on_the_batch(ours):
    model, _ = ours
    lengths = [(9, 1), (40, 39), (2, 1), (25, 3), (7, 6)]
    sequences = [ScoredSequence(torch.randint(0, 256, (n,)).tolist(), n_scored) for n, n_scored in lengths]
    alone = [next(compute_scores(model, [sequence], batch_size=1)) for sequence in sequences]
    for batch_size in (2, 9):
        together = {score.index: score for score in compute_scores(model, sequences, batch_size)}
        assert together.keys() == set(range(len(sequences)))
        for i, expected in enumerate(alone):
            assert len(expected.logprobs) == sequences[i].n_scored
            assert torch.equal(together[i].is_greedy, expected.is_greedy)
            torch.testing.assert_close(together[i].logprobs, expected.logprobs, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def lm_evals_own(folder):
    """The class of lm_eval for models of transformers."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)


@pytest.mark.parametrize("chat", [False, True], ids=["", "chat"])
@pytest.mark.parametrize("task", TASKS)
def test_answers_equal_lm_evals_own(task, chat, folder, ours, lm_evals_own):
    lm_eval = lm_harness.import_lm_eval()
    manager = lm_eval.tasks.TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    found = []
    for lm in (lm_evals_own, *(harness_model(*ours, 256, batch_size, False) for batch_size in (1, 4))):
        options = {"apply_chat_template": chat, "bootstrap_iters": 0, "log_samples": True}
        results = lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, **options)
        samples = sorted(results["samples"][task], key=lambda s: s["doc_id"])
        assert len(samples) == len(QUESTIONS)
        found.append([s["resps"] for s in samples])
    for answers in found[1:]:
        for sample, expected in zip(answers, found[0], strict=True):
            if task == "local_answer":
                assert [a[0].strip() for a in sample] == [a[0].strip() for a in expected]
            elif task == "local_text":
                assert sample[0][0] == pytest.approx(expected[0][0], abs=1e-3)
            else:
                for (a,), (b,) in zip(sample, expected, strict=True):
                    assert float(a[0]) == pytest.approx(float(b[0]), abs=1e-3) and str(a[1]) == str(b[1])


def test_generation_stops_where_it_should(ours):
    prompts = ["a", "some longer prompt", "b", "and one that is longer still"]

    def texts(batch_size, prompts, until=()):
        requests = [SimpleNamespace(args=(prompt, {"max_gen_toks": 30, "until": until})) for prompt in prompts]
        return harness_model(*ours, 80, batch_size, False).generate_until(requests)

    whole = [texts(1, [p])[0] for p in prompts]
    assert texts(3, prompts) == whole
    end = whole[0][5:7]
    short = texts(4, prompts, ("no such", end))
    assert short == [text.split(end)[0] for text in whole] and short[0] != whole[0]


def test_requests_of_many_kinds_are_compiled_once(tmp_path):
    """With --compile, requests of ten lengths give the same texts. PyTorch would give up after eight compilations."""
    write_folder("llama3", tmp_path)
    model, tokenizer = load_model(convert(tmp_path), "cpu", torch.float32, use_kernels=False), load_tokenizer(tmp_path)
    requests = [SimpleNamespace(args=("a" * n, {"max_gen_toks": n})) for n in range(3, 13)]
    plain, compiled = (
        harness_model(model, tokenizer, 60, 2, compile).generate_until(requests) for compile in (False, True)
    )
    assert plain == compiled and len(set(plain)) > 5


def test_options_of_requests():
    greedy, read_options = SamplingParams(temperature=0.0), lm_harness.read_options
    assert read_options({}) == {"params": greedy, "max_new_tokens": 256, "stop": ()}
    cold = {"until": "\n", "max_gen_toks": 5, "do_sample": False, "temperature": 1}
    assert read_options(cold) == {"params": greedy, "max_new_tokens": 5, "stop": ("\n",)}
    hot = {"do_sample": True, "top_k": 3}
    assert read_options(hot) == {"params": SamplingParams(1.0, top_k=3), "max_new_tokens": 256, "stop": ()}
    options = {"temperature": 0.5, "min_p": 0.1, "repetition_penalty": 1.2}
    assert read_options(options)["params"] == SamplingParams(0.5, min_p=0.1, repetition_penalty=1.2)


@pytest.fixture
def few_tasks(monkeypatch):
    """Limits lm_eval to the local tasks, without its own 13,000."""
    from lm_eval import tasks

    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))


def test_calibration_text_of_tasks(folder, few_tasks):
    text = task_text([str(folder / "tasks" / f"{name}.yaml") for name in TASKS], limit=2)
    for expected in ("The sky is  made of stone", "Two and two are  four", "AThe sky is.", "Colour? The sky is"):
        assert expected in text
    assert "Once upon a" not in text


def test_tasks_on_the_command_line(folder, few_tasks, monkeypatch, capsys):
    args = ["--tasks", str(folder / "tasks" / "local_choice.yaml"), "--limit=2"]
    results = json.loads(run_eval(monkeypatch, capsys, folder, *args, "--json").splitlines()[-1])
    assert results["local_choice"]["sample_len"] == 2 and 0 <= results["local_choice"]["acc,none"] <= 1
    with pytest.raises(UsageError, match="no task no_such_task"):
        run_eval(monkeypatch, capsys, folder, "--tasks", "no_such_task")


@pytest.mark.parametrize(
    "args, message",
    [
        (["--text_file=nowhere"], "nowhere"),
        (["--text_file=TEXT", "--max_seq_length=257"], "256"),
        (["--text_file=TEXT", "--max_seq_length=1"], "2 to 256"),
        (["--text_file=TEXT", "--max_seq_length=0"], "2 to 256"),
        (["--text_file=TEXT", "--limit=3"], "belong to --tasks"),
        (["--text_file=TEXT", "--batch_size=0"], "--batch_size"),
        (["--text_file=EMPTY"], "too short"),
        (["--text_file=BINARY"], "UTF-8"),
        (["--tasks=x", "--include_path=nowhere"], "nowhere"),
    ],
)
def test_wrong_arguments_are_named(args, message, folder, monkeypatch, capsys, tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    paths = {"TEXT": folder / "text.txt", "EMPTY": tmp_path / "empty", "BINARY": tmp_path / "binary"}
    args = [f"--text_file={paths[a[12:]]}" if a[12:] in paths else a for a in args]
    with pytest.raises(SystemExit) as e:
        run_script(lambda: run_eval(monkeypatch, capsys, folder, *args))
    err = capsys.readouterr().err
    assert e.value.code == 2 and message in err.splitlines()[-1]
