"""Adapts a model to the language of a domain: masked words on unlabelled text, with L2-SP to the general model.

Runs as it is, without network, on the embedded model (all-MiniLM-L6-v2) and embedded medical text:

    accelerate launch recipes/domain_adapt_mlm.py

beside plain adaptation:

    accelerate launch recipes/domain_adapt_mlm.py --compare

on text of your own, of any size (txt with a text a line, or with --paragraphs a text between blank lines; jsonl, json,
csv or parquet with a text column), watching what is forgotten on general text of your own:

    accelerate launch recipes/domain_adapt_mlm.py --train_file notes.txt --general_file news.jsonl \
        --model_name_or_path google-bert/bert-base-uncased --max_seq_length 256 --output_dir outputs/adapted

The result is a model for the other recipes:

    accelerate launch recipes/medical_textcls.py --model_name_or_path outputs/adapted

Its folder records that θ0 was the general model, and L2-SP in that second step pulls to the general model too: take
this when the domain text was little or narrow, or when the result must stay good at general text. The pull then undoes
some of the adaptation. To pull to the adapted weights instead, and keep what they have learned, name them:

    accelerate launch recipes/medical_textcls.py --model_name_or_path outputs/adapted --l2sp_anchor outputs/adapted

recipes/benchmarks/domain_adaptation.py measures both; with a few biomedical abstracts per class they came out alike.

Perplexities are exp(mean negative log-likelihood) over all masked tokens of packed rows, whose masks are the same in
every evaluation and run; they compare between models of one tokenizer, --max_seq_length and --mlm_probability. A
language-modelling head that the model's files lack is trained alone first, with the body frozen, so that the
perplexities at the start mean something. L2-SP takes such a head for new: its warmed-up values fit the frozen body and
are no pretrained knowledge, so they are not pulled (--l2sp_beta can shrink them). A head that the files hold is
anchored as the body is. A rise of the general perplexity shows what a model forgets that predicted masked words
before; a sentence encoder such as the embedded one learns that anew, and its general perplexity may fall as well.

Arguments in a file: --config recipes/configs/domain_adapt_mlm.yaml. --help lists them all.
"""

from dataclasses import dataclass, field
from typing import Any

from _mlm_data import TextArguments, check_text_arguments, find_texts
from _mlm_head import BATCH, check_masked_lm, check_warm_up, load_masked_lm, untrained_head, warm_up
from _mlm_masking import MaskedRows, NewMasksEachEpoch, WholeWordMasking
from _mlm_rows import pack_texts, rows_folder
from _mlm_scores import PICTURE, draw_courses, perplexity, row_sums, with_perplexity
from _mlm_sparse import predict_masked_only
from _recipe import Run, header
from _recipe_args import ModelArguments, RecipeParser, RecipeTrainingArguments
from _recipe_launch import agreed, is_main_process, one_line_errors, say
from _recipe_model import find_model, load_config, load_tokenizer
from torch import Tensor
from transformers import DataCollatorForTokenClassification, Trainer, set_seed


@dataclass
class AdaptationTrainingArguments(RecipeTrainingArguments):
    """`RecipeTrainingArguments` with defaults chosen on the validation part of the embedded text.

    Changed defaults:
        output_dir (`str`, defaults to `"outputs/domain_adapt_mlm"`)
        learning_rate (`float`, defaults to `2e-4`)
        num_train_epochs (`float`, defaults to `4`): minutes on two cores
        per_device_train_batch_size (`int`, defaults to `16`)
        eval_strategy (`str`, defaults to `"steps"`): both perplexities while they change
        eval_steps (`float`, defaults to `0.25`): four times
    """

    output_dir: str | None = field(
        default="outputs/domain_adapt_mlm", metadata={"help": "Folder that the model and the results are written to."}
    )
    learning_rate: float = field(default=2e-4, metadata={"help": "Initial learning rate."})
    num_train_epochs: float = field(default=4, metadata={"help": "Passes over the training data."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Batch size per device in training."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps or epoch."})
    eval_steps: float | None = field(
        default=0.25, metadata={"help": "Steps between evaluations; below 1: share of the training."}
    )


def make_parser() -> RecipeParser:
    return RecipeParser((ModelArguments, TextArguments, AdaptationTrainingArguments), description=__doc__)


class AdaptationRun(Run):
    """A run that also draws the course of the perplexities.

    Attributes:
        logs: Entries of the trainers' logs, by column of the table.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.logs: dict[str, list[dict[str, Any]]] = {}

    def headline(self) -> str:
        strength = f"lambda {self.args.l2sp_lambda:g} ({self.args.l2sp_schedule})" if self.l2sp_on else "lambda 0"
        return f"{self.source.shown}, {self.data}, seed {self.args.seed}, {strength}"

    def _save(self, trainer: Trainer, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
        if is_main_process():
            draw_courses({name: self.logs[name] for name in results}, self.output_dir / PICTURE)
        return super()._save(trainer, results)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    model_args, text_args, settings = make_parser().parse(argv)

    # Everything that can be refused is refused here, before any text is tokenized.
    check_text_arguments(text_args)
    source = find_model(model_args.model_name_or_path)
    if str(settings["metric_for_best_model"]).endswith("perplexity") and settings["greater_is_better"] is None:
        settings["greater_is_better"] = False  # Trainer knows that of losses alone
    data = text_args.dataset_name or ("local text" if text_args.train_file else "embedded medical text")
    names = ("max_seq_length", "mlm_probability", "head_warmup_steps", "max_eval_rows")
    about = {"shots": None, **{name: getattr(text_args, name) for name in names}}
    run = AdaptationRun(settings, source, "fill-mask", data, about)
    with run.args.main_process_first(desc="finding the texts"):  # a dataset on the Hub is fetched once
        texts = find_texts(text_args)
    config = load_config(source)
    check_masked_lm(source, config)
    tokenizer = load_tokenizer(source, config, text_args.max_seq_length)
    check_masked_lm(source, config, tokenizer)
    untrained = untrained_head(load_masked_lm(source, config), source)
    check_warm_up(untrained, text_args.head_warmup_steps, source)
    collate = DataCollatorForTokenClassification(tokenizer)
    head: dict[str, Tensor] = {}  # filled by the warm-up

    def build(trainer_class: type[Trainer], arguments: Any, datasets: dict[str, Any]) -> Trainer:
        set_seed(arguments.seed)
        model = load_masked_lm(source, config, head)
        # DataParallel, of several devices in one process, cannot join logits of different lengths.
        one_device = arguments.n_gpu <= 1
        if one_device:
            predict_masked_only(model)
        model.accepts_loss_kwargs = one_device  # Trainer then counts the masked tokens of a step for `compute_loss`
        trainer = with_perplexity(trainer_class)(
            model=model,
            args=arguments,
            train_dataset=datasets["train"],
            eval_dataset=datasets["validation"],
            processing_class=tokenizer,
            data_collator=collate,
            compute_metrics=perplexity,
            preprocess_logits_for_metrics=row_sums,
            callbacks=[NewMasksEachEpoch(datasets["train"])],
        )
        trainer.general = datasets.get("general")
        run.logs["plain" if trainer_class is Trainer else run.column()] = trainer.entries
        return trainer

    parameters = run.rehearse(build)
    with rows_folder(run.args) as folder:
        warm_up_rows = text_args.head_warmup_steps * BATCH if untrained else 0
        with run.args.main_process_first(desc="packing the texts"):
            packed = pack_texts(folder, texts, tokenizer, text_args, settings["seed"], warm_up_rows)
        rows = {kind.replace("_", "-"): len(part) for kind, part in packed.rows.items()}
        say(header("Domain adaptation by masked words", run, parameters, rows))
        say(f"  rows    {text_args.max_seq_length} tokens each; {packed.tokens['train']:,} tokens to train on")
        for note in packed.notes:
            say(f"  note    {note}")
        masking = WholeWordMasking(tokenizer, text_args.mlm_probability)
        datasets = {kind: MaskedRows(part, masking) for kind, part in packed.rows.items() if kind != "warm_up"}
        datasets["train"] = MaskedRows(packed.rows["train"], masking, settings["seed"])
        if untrained:
            say(f"  head    {len(untrained)} tensors of it are not in the model's files; a warm-up trains them first")
            kinds = [kind for kind in ("train", "warm_up") if kind in packed.rows]
            parts = [MaskedRows(packed.rows[kind], masking, settings["seed"]) for kind in kinds]
            options = {"steps": text_args.head_warmup_steps, "seed": settings["seed"], "device": run.args.device}
            options["progress"] = not run.args.disable_tqdm
            # In the main process alone: all of them get the same values.
            head |= agreed(lambda: warm_up(load_masked_lm(source, config), untrained, parts, collate, **options))
        run(build, datasets)
    say(f"{PICTURE} shows both perplexities over the steps. To fine-tune the result:")
    say(f"accelerate launch recipes/medical_textcls.py --model_name_or_path {run.output_dir}")


if __name__ == "__main__":
    main()
