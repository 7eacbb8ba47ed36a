"""Runs tasks of the lm-evaluation-harness (the package lm_eval) with a model. eval.py is the command; quantize.py
calibrates on task_text.

    lm = harness_model(model, tokenizer, max_length=2048, batch_size=8, compile=False)
    results, table = evaluate(lm, ["hellaswag"], task_manager(["hellaswag"], None), limit=100)

lm_eval is imported at first use, so that this file can be imported without lm_eval.
"""

from pathlib import Path

from tqdm import tqdm

from engine.sampling_params import SamplingParams
from engine.scheduler import build_scheduler
from engine.sequence import Sequence
from evaluation.scoring import ScoredSequence, compute_scores
from model import Transformer
from text.chat_template import render
from text.tokenizer import Tokenizer
from utils.errors import UsageError


def import_lm_eval():
    try:
        import lm_eval
        import lm_eval.api.model
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError as e:
        raise UsageError(f"--tasks needs the lm-evaluation-harness: pip install 'lm_eval>=0.4.8' ({e})") from None
    return lm_eval


def task_manager(tasks: list[str], include_path: Path | None):
    """Returns lm_eval's index of tasks. Raises UsageError if the index lacks one of tasks."""
    if include_path and not include_path.is_dir():
        raise UsageError(f"--include_path {include_path}: there is no such folder")
    manager = import_lm_eval().tasks.TaskManager(include_path=str(include_path) if include_path else None)
    unknown = [t for t in tasks if t not in manager.all_tasks and not Path(t).is_file()]
    if unknown:
        raise UsageError(f"lm_eval has no task {', '.join(unknown)}; `lm_eval ls tasks` lists them")
    return manager


def evaluate(lm, tasks: list[str], manager, limit: int | None, chat: bool = False) -> tuple[dict, str]:
    """Returns (lm_eval's results by task and metric, a table of the results)."""
    lm_eval = import_lm_eval()
    load_tasks = getattr(manager, "load", None) or manager.load_task_or_group  # the name depends on lm_eval's version
    try:
        load_tasks(tasks)
    except Exception as e:  # a task is a program that downloads data, and may raise anything
        raise UsageError(f"lm_eval cannot load {', '.join(tasks)}: {' '.join(str(e).split())[:300]}") from None
    results = lm_eval.simple_evaluate(
        lm, tasks=tasks, task_manager=manager, limit=limit, apply_chat_template=chat, log_samples=False
    )
    table = lm_eval.utils.make_table(results)
    if results.get("groups"):
        table += "\n" + lm_eval.utils.make_table(results, "groups")
    for metrics in results["results"].values():
        metrics.pop("alias", None)  # the task's name in the table
    return results["results"], table


def task_text(tasks: list[str], limit: int) -> str:
    """Returns the texts that a model scores in the first limit examples of each task."""
    manager, texts = task_manager(tasks, None), []

    class RequestCollector(import_lm_eval().api.model.LM):
        """Records every request, and returns a dummy answer."""

        def collect(self, requests, answer) -> list:
            for request in requests:
                texts.append("".join(argument for argument in request.args if isinstance(argument, str)))
            return [answer] * len(requests)

        def loglikelihood(self, requests):
            return self.collect(requests, (0.0, False))

        def loglikelihood_rolling(self, requests):
            return self.collect(requests, 0.0)

        def generate_until(self, requests):
            return self.collect(requests, "")

    evaluate(RequestCollector(), tasks, manager, limit)
    return "\n\n".join(texts)


def harness_model(model: Transformer, tokenizer: Tokenizer, max_length: int, batch_size: int, compile: bool):
    """Returns the model as lm_eval's TemplateLM."""

    class Model(HarnessModel, import_lm_eval().api.model.TemplateLM):  # here: the base class needs lm_eval
        """HarnessModel implements the abstract methods of TemplateLM."""

    return Model(model, tokenizer, max_length, batch_size, compile)


class HarnessModel:
    """The methods that lm_eval's TemplateLM leaves abstract. They tokenize, truncate and score as lm_eval's class for
    Hugging Face models does."""

    tokenizer_name = "gpt-fast"

    def __init__(self, model: Transformer, tokenizer: Tokenizer, max_length: int, batch_size: int, compile: bool):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.max_batch_size, self.compile = max_length, batch_size, compile
        self.bos = tokenizer.special_tokens_map.get("bos_token")

    @property
    def eot_token_id(self) -> int:
        return next(iter(self.model.config.eos_ids), self.prefix_token_id)

    @property
    def prefix_token_id(self) -> int:
        config, tokenizer = self.model.config, self.tokenizer
        for token in (tokenizer.special_token_ids.get(self.bos, config.bos_id), *config.eos_ids, *tokenizer.bos_ids):
            if token is not None:
                return token
        raise UsageError("this task scores whole texts, and the model has no token to begin one with")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Encodes string. Special tokens that are written in string become special tokens, because lm_eval passes those
        of a chat template as text."""
        ids = self.tokenizer.encode_parts(self.tokenizer.split_at_special_tokens(string))
        if add_special_tokens is None:
            add_special_tokens = self.bos is None or not string.startswith(self.bos)
        return self.tokenizer.bos_ids + ids if add_special_tokens else ids

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        template = self.tokenizer.chat_template
        if template is None:
            raise UsageError("this checkpoint has no chat template; leave out --apply_chat_template")
        text = render(template, self.tokenizer.special_tokens_map, chat_history, add_generation_prompt)
        if not add_generation_prompt:  # cut the text after the last message: the model continues this message
            last = chat_history[-1]["content"].strip()
            text = text[: text.rindex(last) + len(last)]
        return text

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """Scores requests (_, context ids, answer ids). Returns for each request the log-likelihood of the answer, and
        whether greedy decoding gives the answer."""
        longest = self.max_length + 1
        sequences = [ScoredSequence((context + answer)[-longest:], len(answer)) for _, context, answer in requests]
        if any(sequence.n_scored >= len(sequence.ids) for sequence in sequences):
            raise UsageError(f"an answer to score is longer than --max_seq_length {self.max_length}")
        results = [(0.0, True)] * len(sequences)
        scores = compute_scores(self.model, sequences, self.max_batch_size, self.compile) if sequences else []
        for score in tqdm(scores, "log-likelihoods", len(sequences), disable=disable_tqdm or None):
            results[score.index] = score.logprobs.double().sum().item(), bool(score.is_greedy.all())
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihoods of whole texts. The texts are cut into windows."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows = []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((i, *make_disjoint_window(window)))
        sums = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for (i, _, _), (logprob, _) in zip(windows, scores, strict=True):
            sums[i] += logprob
        return sums

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        answers = [self.sequence_of_request(*request.args, seed=i) for i, request in enumerate(requests)]
        scheduler = build_scheduler(self.model, answers, self.max_batch_size, self.compile)
        bar = tqdm(scheduler.run(answers), "generations", len(answers), disable=disable_tqdm or None)
        for _, answer in bar:
            if answer.error:
                raise UsageError(answer.error)
        return [answer.text for answer in answers]

    def sequence_of_request(self, text: str, kwargs: dict, seed: int) -> Sequence:
        options = read_options(kwargs) | {"tokenizer": self.tokenizer, "eos_ids": self.model.config.eos_ids}
        return Sequence(self.prompt_ids(text, options["max_new_tokens"]), seed=seed, **options)

    def prompt_ids(self, text: str, max_new_tokens: int) -> list[int]:
        """Encodes text. If the ids leave no room for an answer, drops the first ids."""
        n = self.max_length - max_new_tokens
        if n < 1:
            raise UsageError(f"a task asks for {max_new_tokens} tokens, and --max_seq_length is {self.max_length}")
        return self.tok_encode(text)[-n:] or [self.prefix_token_id]


def read_options(kwargs: dict) -> dict:
    """Reads the keyword arguments of lm_eval's generation request. Returns fields of Sequence."""
    sampling = {name: value for name, value in kwargs.items() if value}  # None and 0 mean the default
    if kwargs.get("do_sample") is False:
        sampling["temperature"] = 0.0
    elif kwargs.get("do_sample") and "temperature" not in kwargs:
        sampling["temperature"] = 1.0
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    max_new_tokens = next((int(kwargs[name]) for name in names if kwargs.get(name) is not None), 256)
    until = kwargs.get("until") or []
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    return {"params": SamplingParams.from_options(sampling), "max_new_tokens": max_new_tokens, "stop": stop}
