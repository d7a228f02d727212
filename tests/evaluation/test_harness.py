"""The model as the lm-evaluation-harness asks for it: on a task of its own kind, beside ours.

Skipped without the extra `eval`, which is large: pip install -c constraints.txt '.[eval]'.
"""

import json

import pytest
from flax import nnx
from tokenizers import Tokenizer as Bpe
from tokenizers.processors import TemplateProcessing

from dsmoe_jax.data.tokenizer import END_OF_TEXT, PAD
from dsmoe_jax.evaluation.downstream import TokenisedSets
from dsmoe_jax.evaluation.likelihood import Scorer
from dsmoe_jax.evaluation.question_sets import read_task
from dsmoe_jax.model.build import abstract_model
from dsmoe_jax.model.generation import generate
from dsmoe_jax.runs.loading import Writer

pytest.importorskip("lm_eval", reason="takes the extra eval: the lm-evaluation-harness")
pytestmark = pytest.mark.filterwarnings("ignore")  # its own, of the many packages that it imports

LENGTH = 48
ROWS = [
    {"context": "Question: Which animal barks?\nAnswer:", "choices": [" cat", " dog", " a bird"],
     "label": 1},
    {"context": "Question: 2 + 3?\nAnswer:", "choices": [" 4", " five"], "label": 1},
    {"context": "Wo liegt Köln? ", "choices": ["am Rhein", "北京", "at sea"], "label": 0},
    {"context": "for i in range(10):\n" * 9, "choices": ["    print(i)", " "], "label": 0},
]  # fmt: skip
TASK = """
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: acc_bytes}}]
"""


@pytest.fixture(scope="module")
def run(converted, tokenizer, tiny_corpus):
    config, state = converted
    model = nnx.merge(abstract_model(config.model), *state)
    return Writer(config, model, tokenizer, tiny_corpus / "tokenizer.json", 0)


@pytest.fixture(scope="module")
def model(run):
    from dsmoe_jax.evaluation.harness import HarnessModel

    return HarnessModel(run, LENGTH, batch_size=4)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """`evaluated(model)`: results of the harness on its task with our rows."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    directory = tmp_path_factory.mktemp("task")
    file = directory / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (directory / "own.yaml").write_text(TASK.format(file=file))

    def evaluate(model):
        tasks = TaskManager(include_path=str(directory), include_defaults=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_DATASETS_CACHE", str(directory / "cache"))
            return lm_eval.simple_evaluate(
                model=model, tasks=["own"], task_manager=tasks, bootstrap_iters=0
            )

    return file, evaluate


def nats(results):
    samples = sorted(results["samples"]["own"], key=lambda sample: sample["doc_id"])
    return [response[0][0] for sample in samples for response in sample["resps"]]


def test_the_numbers_are_ours(model, run, evaluated):
    file, evaluate = evaluated
    theirs = evaluate(model)["results"]["own"]
    sets = TokenisedSets(run.tokenizer, {"own": read_task(str(file))}, LENGTH)
    ours = sets.measure(Scorer(run.model, LENGTH, batch_size=4))["own"]
    assert ours["cut"] == 1
    for name, their_name in (
        ("accuracy", "acc"),
        ("accuracy_per_character", "acc_norm"),
        ("accuracy_per_byte", "acc_bytes"),
    ):
        assert ours[name]["value"] == theirs[f"{their_name},none"], name


def test_each_answer_is_as_in_its_own_model_of_transformers(model, theirs, run, evaluated):
    pytest.importorskip("accelerate", reason="the harness wants it for models of transformers")
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    bpe = Bpe.from_file(str(run.tokenizer_file))
    begins = [(END_OF_TEXT, run.tokenizer.eos_id)]
    bpe.post_processor = TemplateProcessing(single=f"{END_OF_TEXT} $A", special_tokens=begins)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PAD
    )
    other = HFLM(
        theirs, tokenizer=tokenizer, max_length=LENGTH, add_bos_token=True, batch_size=1,
        device="cpu", dtype="float32",
    )  # fmt: skip
    evaluate = evaluated[1]
    assert nats(evaluate(model)) == pytest.approx(nats(evaluate(other)), rel=1e-5)


def instances(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def test_a_whole_text(model):
    """Likelihoods of its parts add up, since every part sees what stands before it."""
    whole, nothing = model.loglikelihood_rolling(
        instances("loglikelihood_rolling", ("def f(x): return x",), ("",))
    )
    (first, _), (second, _) = model.loglikelihood(
        instances("loglikelihood", ("", "def f(x):"), ("def f(x):", " return x"))
    )
    assert whole == pytest.approx(first + second, rel=1e-5)
    assert nothing == 0


def test_written_texts(model, run):
    """The likeliest tokens, up to a stop string; each text is the one that it would be alone."""
    settings = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False, "temperature": 0.7}
    asked = instances("generate_until", ("import", settings), ("def", {"max_gen_toks": 6}))
    texts = model.generate_until(asked)
    assert "\n" not in texts[0]
    for text, context in zip(texts, ("import", "def"), strict=True):
        prompt = [run.tokenizer.eos_id, *run.tokenizer.encode(context)]
        allowed_V = run.tokenizer.may_be_written(512)
        wanted = generate(run.model, [prompt], 6, allowed_V=allowed_V)
        assert run.tokenizer.decode(wanted.tokens_BG[0]).startswith(text)
    assert texts[1]
    assert model.generate_until(asked[1:]) == texts[1:]
    with pytest.raises(ValueError, match=r"generation_kwargs=\['num_beams'\]: must be among"):
        model.generate_until(instances("generate_until", ("x", {"num_beams": 2})))
    with pytest.raises(ValueError, match="max_gen_toks=48: must be less than max_length=48"):
        model.generate_until(instances("generate_until", ("x", {"max_gen_toks": 48})))
