"""The processes of a layout as torch's device meshes, which have the groups that messages go through."""

import torch
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from benthic.parallel.layout import AXES, Layout


class Mesh:
    """Made by all processes together, in a group of ``layout.world`` that is there already."""

    def __init__(self, layout: Layout, device: str = "cpu") -> None:
        self.layout = layout
        everyone = torch.arange(layout.world)
        self._axes = DeviceMesh(device, everyone.view(layout.sizes), mesh_dim_names=AXES)
        sharded = everyone.view(layout.pipeline, layout.replicate, -1)
        self._sharded = DeviceMesh(device, sharded, mesh_dim_names=("pipeline", "replicate", "sharded"))
        data = everyone.view(layout.pipeline, -1)
        self._data = DeviceMesh(device, data, mesh_dim_names=("pipeline", "data"))

    @property
    def weights(self) -> DeviceMesh:
        """What weights that are not an expert's are divided over, after a dimension of copies if there are some."""
        return self._with_copies(self._sharded, "sharded")

    @property
    def experts(self) -> DeviceMesh:
        """The same for a rank's own experts."""
        return self._with_copies(self._axes, "shard")

    @property
    def expert_group(self) -> ProcessGroup:
        """The ranks among which the experts are divided."""
        return self._axes.get_group("expert")

    @property
    def pipeline_group(self) -> ProcessGroup:
        """The ranks that have the other stages, of the same share of the batch."""
        return self._axes.get_group("pipeline")

    @property
    def data_group(self) -> ProcessGroup:
        """The ranks that share out the batch; each stage of a pipeline has one."""
        return self._data.get_group("data")

    def _with_copies(self, mesh: DeviceMesh, name: str) -> DeviceMesh:
        return mesh["replicate", name] if self.layout.replicate > 1 else mesh[name]
