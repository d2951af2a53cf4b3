"""Whether a run fits the processes it is to be spread over; if not, one line says what would."""

from benthic.config.schema import RunConfig
from benthic.errors import InputError
from benthic.parallel.stage_ranks import KINDS


def refuse_misfit(config: RunConfig, processes: int) -> None:
    """Raise InputError if the settings of ``parallel`` do not fit ``processes``, the model or the batch."""
    parallel = config.parallel
    axes = "parallel.pipeline x expert x shard x replicate"
    if parallel.processes != processes:
        product = f"{parallel.pipeline} x {parallel.expert} x {parallel.shard} x {parallel.replicate}"
        raise InputError(
            f"{axes} = {product} = {parallel.processes}, but {_count(processes)} started; "
            f"{_would_fit(config, processes)}"
        )
    if parallel.layers is not None and parallel.pipeline == 1:
        raise InputError("parallel.layers: gives layers to the stages of a pipeline; parallel.pipeline is 1")
    if parallel.fp8_dispatch and config.precision.compute != "fp8":
        raise InputError(
            f'parallel.fp8_dispatch=true needs precision.compute="fp8", not "{config.precision.compute}": experts '
            "round to FP8 what they are sent"
        )
    if processes == 1:
        return
    if config.train.minutes is not None:
        raise InputError("train.minutes: what a machine does in so many is measured on one process; give train.steps")
    if config.train.device != "cpu":
        raise InputError(f'train.device="{config.train.device}" is for one process: several exchange through gloo')
    if config.train.schedule.mtp_from_last_layer:
        raise InputError(
            "train.schedule.mtp_from_last_layer=true: the modules and the last layer may be on different processes; "
            "it is for one process"
        )
    experts = config.model.n_routed_experts
    if experts % parallel.expert:
        raise InputError(
            f"parallel.expert={parallel.expert} must divide model.n_routed_experts={experts}: {_divisors(experts)}"
        )
    if parallel.pipeline > 1:
        _refuse_pipeline(config)
    _refuse_batch(config)


def _refuse_pipeline(config: RunConfig) -> None:
    parallel, train = config.parallel, config.train
    each = KINDS[parallel.schedule].stages_per_rank
    # The first stage may be the embedding alone, the last the head.
    most = (config.model.num_hidden_layers + 2) // each
    if parallel.pipeline > most:
        raise InputError(
            f'parallel.pipeline={parallel.pipeline} with parallel.schedule="{parallel.schedule}" makes '
            f"{each * parallel.pipeline} stages, too many for model.num_hidden_layers="
            f"{config.model.num_hidden_layers}; {most} can"
        )
    if parallel.layers is not None:
        _refuse_layers(config, parallel.layers, each * parallel.pipeline)
    if parallel.zero > 1:
        raise InputError(
            f"parallel.zero={parallel.zero} must be 1 with parallel.pipeline={parallel.pipeline}: a step of a pipeline "
            "keeps weights gathered, and gradients whole, until its end"
        )
    rows = train.batch_size // parallel.data_ranks
    if rows // (train.micro_batch_size or train.batch_size) < parallel.pipeline:
        given = train.micro_batch_size or f"none (that is, {train.batch_size})"
        fitting = rows // parallel.pipeline
        remedy = f"at most {fitting} would" if fitting else f"a batch of {parallel.processes} and 1 would"
        raise InputError(
            f"train.micro_batch_size={given} leaves parallel.pipeline={parallel.pipeline} processes fewer "
            f"micro-batches than they are, of train.batch_size={train.batch_size} on {parallel.data_ranks} data ranks; "
            f"{remedy} do"
        )


def _refuse_layers(config: RunConfig, layers: tuple[int, ...], stages: int) -> None:
    """The first stage may be the embedding alone, the last the head; those between have a layer each at least."""
    wanted = config.model.num_hidden_layers
    if len(layers) != stages or sum(layers) != wanted or not all(layers[1:-1]):
        raise InputError(
            f"parallel.layers={list(layers)} must be {stages} numbers, one for each stage, that add up to "
            f"model.num_hidden_layers={wanted}; only the first and the last may be 0"
        )


def _refuse_batch(config: RunConfig) -> None:
    batch, ranks = config.train.batch_size, config.parallel.data_ranks
    if batch % ranks:
        raise InputError(
            f"train.batch_size={batch} cannot be divided among {ranks} data ranks "
            f"(parallel.expert x shard x replicate); {max(1, round(batch / ranks)) * ranks} can"
        )


def _count(processes: int) -> str:
    return "1 process was" if processes == 1 else f"{processes} processes were"


def _would_fit(config: RunConfig, processes: int) -> str:
    """What to change so that the product is right."""
    wanted = config.parallel.processes
    start = f"start it with torchrun --nproc-per-node {wanted}" if wanted > 1 else "start it without torchrun"
    others, left = wanted // config.parallel.shard, processes
    if left % others == 0:
        return f"{start}, or give --set parallel.shard={left // others}"
    return start


def _divisors(number: int) -> str:
    *most, last = [str(size) for size in range(1, number + 1) if number % size == 0]
    return f"{', '.join(most)} or {last} would" if most else f"{last} would"
