"""Every section of `params.yaml` as a frozen dataclass: each setting with its sentence, its default and what it may be.

Whatever changes a result is a field here and nothing else is; `dho params` prints all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dho.catalogue import listed
from dho.catalogue.datasets import DATASETS
from dho.catalogue.jobs import DEFAULT_KIND, JOB_KINDS
from dho.catalogue.methods import METHODS
from dho.catalogue.targets import TARGETS
from dho.catalogue.teachers import CLASSIFIERS
from dho.config.settings import setting

MAX_SEED = 2**63 - 1
"""Seeds are written into 8 bytes (`dho/data/views.py`) and passed to torch."""
MAX_PILLOW_PIXELS = 178_956_970
"""Pixels beyond which Pillow itself refuses an image."""


@dataclass(frozen=True)
class SplitsConfig:
    """How the images are divided (stage `prepare`). Splits are class-balanced wherever the classes are known."""

    seed: int = setting(
        0,
        "Seed of the draw; the same seed and images give the same splits on every platform.",
        low=0,
        high=MAX_SEED,
    )
    shots: int | None = setting(
        16, "Labelled images per class (K); null, with labelled_fraction null, takes every labelled image.", low=1
    )
    labelled_fraction: float | None = setting(
        None, "Labelled share of each class instead of shots (0.01 is the paper's 1 %).", above=0, high=1
    )
    val_per_class: int = setting(
        100, "Images per class held out of train for val, where the data set has no val list of its own.", low=1
    )
    test_per_class: int = setting(
        100, "Images per class held out of train for test, where the data set has no test list of its own.", low=1
    )
    unlabelled: int | None = setting(None, "Unlabelled images kept; null keeps all the rest of train.", low=1)
    captions: int = setting(
        0, "Images with captions, set aside for pretraining a stand-in teacher; nothing else uses them.", low=0
    )


@dataclass(frozen=True)
class DataConfig:
    """Which images, where they come from, and what to do with bad ones (stages `fetch` and `prepare`)."""

    name: str = setting(
        "fashion_mnist", f"{listed(DATASETS)}; or a DataSet of your own, as module:OBJECT.", names=tuple(DATASETS)
    )
    source: str | None = setting(
        None, "Local path tried before any download; where nothing is downloaded, the folder of images."
    )
    class_names: list[str] | None = setting(
        None, "Class names in label order; null takes the catalogue's (for `folder`: the sub-folders, sorted)."
    )
    templates: list[str] | None = setting(
        None, "Prompt templates with one {} for the class name; null takes the catalogue's."
    )
    labels: str | None = setting(
        None, "`folder` only: a CSV of path,label (an empty label: unlabelled) instead of one sub-folder per class."
    )
    val: str | None = setting(None, "`folder` only: a CSV of path,label that makes the val split.")
    test: str | None = setting(None, "`folder` only: a CSV of path,label that makes the test split.")
    captions: str | None = setting(None, "`folder` only: a CSV of path,caption that makes the captions split.")
    on_leak: str = setting(
        "error",
        "The same image in two splits: stop and name both, or drop the copy on the training side.",
        choices=("error", "drop"),
    )
    max_rejected: float = setting(
        0.01, "Largest share of files that may be unreadable; beyond it `prepare` stops.", low=0, high=1
    )
    max_pixels: int = setting(
        50_000_000,
        "Images with more pixels than this are rejected before they are decoded (decompression bombs).",
        low=1,
        high=MAX_PILLOW_PIXELS,
    )
    shard_images: int = setting(5000, "Images per tar shard.", low=1)
    splits: SplitsConfig = field(default_factory=SplitsConfig)


@dataclass(frozen=True)
class ViewsConfig:
    """The seeded augmentations that teacher and student share (Table 7: random resized crop 0.5-1.0, flip)."""

    seed: int = setting(
        0,
        "Seed of the views; with an image's SHA-256 and a view's number it fixes the crop and the flip.",
        low=0,
        high=MAX_SEED,
    )
    count: int = setting(
        4,
        "Views per image (V): epoch e trains on view e mod V, and the teacher store holds V embeddings per image.",
        low=1,
    )
    scale: list[float] = setting(
        [0.5, 1.0], "Smallest and largest share of the image's area that a crop keeps.", above=0, high=1
    )
    flip: bool = setting(True, "Mirror half of the views left to right.")


@dataclass(frozen=True)
class TeacherConfig:
    """The vision-language teacher: any open_clip model (stage `teach`)."""

    model: str = setting(
        "local-dir:data/pretrained", "open_clip model: a name such as ViT-B-16, hf-hub:org/repo, or local-dir:folder."
    )
    pretrained: str | None = setting(
        None, "open_clip pretrained tag or checkpoint file; null where the model's name includes its weights."
    )
    classifier: str = setting(
        "zero_shot",
        f"How an embedding becomes logits: {listed(CLASSIFIERS)}; or a class of your own.",
        names=tuple(CLASSIFIERS),
    )
    batch_size: int = setting(256, "Images per forward pass and rank.", low=1)
    precision: str = setting("fp32", "Arithmetic of the image tower.", choices=("fp32", "bf16"))
    shard_images: int = setting(
        4096, "Images per shard of the teacher store; an interrupted run loses at most one shard per rank.", low=1
    )


@dataclass(frozen=True)
class PretrainConfig:
    """The stand-in teacher, trained on the captions split (stage `pretrain`).

    With a real open_clip checkpoint set enabled: false.
    """

    enabled: bool = setting(
        True, "Train a stand-in teacher on the captions split; false when teacher.model is a real one."
    )
    architecture: dict[str, Any] | None = setting(
        None,
        "open_clip config (model_cfg and preprocess_cfg) of the model to train; null is dho/teacher/dho-tiny.json.",
    )
    seed: int = setting(0, "Seed of weights, batches and caption noise.", low=0, high=MAX_SEED)
    epochs: int = setting(6, "Passes over the captions split.", low=1)
    batch_size: int = setting(256, "Image-caption pairs per step.", low=2)
    learning_rate: float = setting(1e-3, "Peak learning rate (AdamW, cosine with warm-up of a tenth).", above=0)
    weight_decay: float = setting(0.1, "AdamW weight decay.", low=0)
    caption_templates: list[str] = setting(
        ["a photo of a {}."], "Captions are made from these where the data set has no captions of its own."
    )
    confusions: dict[str, dict[str, float]] = setting(
        {},
        "How often a class has another's name: {class: {other name: rate}}; as on the web, errors are systematic.",
    )


@dataclass(frozen=True)
class StudentConfig:
    """The student: one timm backbone, two linear heads (Eq. 5, 6)."""

    model: str = setting("resnet18", "timm model name of the backbone.")
    model_args: dict[str, Any] = setting({}, "Further arguments of timm.create_model, e.g. {layers: [1, 1, 1, 1]}.")
    pretrained: bool = setting(False, "Start from timm's ImageNet weights (downloads them once).")
    input_size: int = setting(224, "Side of the square input, pixels.", low=8)
    mean: list[float] = setting(
        [0.485, 0.456, 0.406], "Channel means of the input normalisation, of values in 0-1.", low=0, high=1
    )
    std: list[float] = setting(
        [0.229, 0.224, 0.225], "Channel standard deviations of the input normalisation.", above=0
    )
    interpolation: str = setting("bilinear", "Resampling of crops to the input size.", choices=("bilinear", "bicubic"))


@dataclass(frozen=True)
class TrainConfig:
    """The two-stream training of the student (Algorithm 1; Table 7 for recipes)."""

    method: str = setting("dho", f"{listed(METHODS)}; or a class of your own.", names=tuple(METHODS))
    method_args: dict[str, Any] = setting({}, "The method's own settings, which its row in the catalogue names.")
    seed: int = setting(0, "Seed of weights and of both streams' order.", low=0, high=MAX_SEED)
    epochs: int = setting(5, "Passes over the unlabelled stream.", low=1)
    batch_labelled: int = setting(64, "Labelled images per step, over all ranks.", low=1)
    batch_unlabelled: int = setting(
        64, "Most unlabelled images per step, over all ranks; an epoch is cut into equal steps.", low=1
    )
    unlabelled_includes_labelled: bool = setting(
        True, "Draw the unlabelled batch from both splits (Alg. 1 line 7); false: as in the reference code."
    )
    accumulate: int = setting(
        1,
        "Micro-batches per step and rank: the same gradient with less memory (BatchNorm sees the micro-batch).",
        low=1,
    )
    lambda_ce: float = setting(0.5, "Weight of L_CE; L_KD has 1 - lambda_ce.", low=0, high=1)
    eta: float = setting(2.0, "Distillation temperature of teacher and student in training.", above=0)
    learning_rate: float = setting(1e-3, "Peak learning rate of AdamW (0.9, 0.999).", above=0)
    weight_decay: float = setting(1e-2, "AdamW weight decay.", low=0)
    warmup_steps: int = setting(0, "Steps of linear warm-up before the cosine to zero.", low=0)
    precision: str = setting("auto", "auto: bf16 autocast on GPU, fp32 on CPU.", choices=("auto", "fp32", "bf16"))
    channels_last: bool = setting(True, "Keep images and weights in channels-last memory order.")
    compile: bool = setting(False, "Compile the student with torch.compile.")
    log_every: int = setting(20, "Steps between logged metrics.", low=1)
    checkpoint_every: int = setting(200, "Steps between checkpoints.", low=1)
    keep_checkpoints: int = setting(2, "Newest checkpoints kept during training.", low=1)
    eval_batch_size: int = setting(512, "Images per forward pass and rank when head outputs are made.", low=1)


@dataclass(frozen=True)
class EvaluateConfig:
    """alpha and beta, searched on val from stored head outputs (Eq. 8; stage `evaluate`)."""

    alphas: list[float] = setting(
        [round(0.05 * i, 2) for i in range(21)],
        "Grid of alpha, the CE head's weight; 0 and 1 are the single heads.",
        low=0,
        high=1,
    )
    betas: list[float] = setting(
        [0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0],
        "Grid of beta, the KD head's temperature; must hold 0.3 and 0.5.",
        above=0,
    )
    ece_bins: int = setting(15, "Bins of the expected calibration error.", low=2)


@dataclass(frozen=True)
class TrackingConfig:
    """Where runs are recorded. Environment variable MLFLOW_TRACKING_URI takes precedence over uri."""

    uri: str = setting("sqlite:///mlflow.db", "MLflow tracking and registry address.")
    experiment: str = setting("dho", "MLflow experiment.")
    system_metrics_every: float = setting(
        10.0, "Seconds between system metrics (CPU, memory, disk, network, GPU).", above=0
    )


@dataclass(frozen=True)
class RulesConfig:
    """What a candidate has to show on the test set to become the champion (`dho promote`); null requires nothing."""

    min_top1: float | None = setting(None, "Smallest top-1 (share).", low=0, high=1)
    min_class_recall: float | None = setting(None, "Smallest recall of the worst class (share).", low=0, high=1)
    max_ece: float | None = setting(None, "Largest expected calibration error.", low=0, high=1)
    max_latency_ms: float | None = setting(
        None, "Longest time to answer one image, p99 on one thread, milliseconds.", above=0
    )
    max_size_mb: float | None = setting(None, "Largest package, megabytes (10^6 bytes).", above=0)
    min_gain: float = setting(
        0.0,
        "Smallest gain in top-1 over the champion (share); a candidate may be worse where it is below 0.",
        low=-1,
        high=1,
    )
    max_class_drop: float = setting(
        0.02,
        "Drop in recall (share) against the champion that no class may exceed significantly.",
        low=0,
        high=1,
    )
    confidence: float = setting(0.95, "Confidence of the paired bootstrap intervals.", above=0, high=0.9999)
    resamples: int = setting(10_000, "Resamples of the paired bootstrap.", low=100)
    seed: int = setting(0, "Seed of the resamples.", low=0, high=MAX_SEED)


@dataclass(frozen=True)
class RegistryConfig:
    """The model registry (stage `register`, `dho promote`)."""

    name: str = setting(
        "dho-student", "Registered model that versions are added to; alias `candidate` moves to the newest."
    )
    intended_use: str = setting(
        "Classifying photos like those it was trained on into its classes.", "Sentence of the model card."
    )
    data_licence: str | None = setting(None, "Licence of the data, for the model card; null takes the catalogue's.")
    teacher_licence: str | None = setting(
        None, "Licence of the teacher's weights, for the model card; null says that it is not known."
    )
    precision: str = setting(
        "float32",
        "Arithmetic of the registered network; int8 is smaller and often faster, is calibrated on val, and is "
        "registered with its own accuracy.",
        choices=("float32", "int8"),
    )
    promote: str = setting(
        "manual", "`auto`: stage `register` also promotes, where the rules allow it.", choices=("manual", "auto")
    )
    rules: RulesConfig = field(default_factory=RulesConfig)


@dataclass(frozen=True)
class KubernetesConfig:
    """The job that stages `teach` and `train` become where launch.target is kubernetes; the rest of it is in k8s/."""

    namespace: str = setting("dho", "Namespace of the job.")
    kind: str = setting(
        DEFAULT_KIND, f"Kind of the job: {listed(JOB_KINDS)}; or a class of your own.", names=tuple(JOB_KINDS)
    )
    nodes: int = setting(2, "Pods, each on a node of its own where there are enough nodes.", low=1)
    gpus: int | None = setting(
        None, "GPUs, and processes, per node; null trains on CPUs with one process per node.", low=1
    )
    elastic: str | None = setting(
        None, "Fewest and most nodes with which training continues, as in 1:4; null always needs all of them."
    )
    queue: str | None = setting(None, "Kueue's LocalQueue that admits the job.")
    image: str | None = setting(None, "Image of the pods; null takes that of k8s/.")


@dataclass(frozen=True)
class LaunchConfig:
    """How stages `teach` and `train` are started; results do not depend on it beyond BatchNorm's batches."""

    target: str = setting("local", f"Where stages teach and train run. {listed(TARGETS)}.", choices=tuple(TARGETS))
    workers: int | None = setting(
        None,
        "Data-loading processes per rank; 0 loads in the training process itself; null is one per CPU of the rank, at "
        "most 8, with a GPU, and 0 without one, where they would take the CPUs from training.",
        low=0,
    )
    processes: int | None = setting(
        None, "torchrun processes on this machine; null is one per GPU, or 1 without a GPU.", low=1
    )
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)


@dataclass(frozen=True)
class Config:
    """All of `params.yaml`."""

    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    registry: RegistryConfig = field(default_factory=RegistryConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
