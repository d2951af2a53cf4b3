"""Whether a run fits the processes it is to be spread over; if not, one line says what would."""

from benthic.config.schema import RunConfig
from benthic.errors import InputError


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
    if processes == 1:
        return
    if config.train.minutes is not None:
        raise InputError("train.minutes: what a machine does in so many is measured on one process; give train.steps")
    experts = config.model.n_routed_experts
    if experts % parallel.expert:
        raise InputError(
            f"parallel.expert={parallel.expert} must divide model.n_routed_experts={experts}: {_divisors(experts)}"
        )
    if parallel.pipeline > config.model.num_hidden_layers:
        raise InputError(
            f"parallel.pipeline={parallel.pipeline} must be at most "
            f"model.num_hidden_layers={config.model.num_hidden_layers}"
        )
    if parallel.fp8_dispatch and config.precision.compute != "fp8":
        raise InputError(
            f'parallel.fp8_dispatch=true needs precision.compute="fp8", not "{config.precision.compute}": experts '
            "round to FP8 what they are sent"
        )
    _refuse_batch(config)


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
