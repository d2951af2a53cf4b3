import torch

from benthic.inference.huge_pages import use_huge_pages


def test_weights_keep_their_values_and_places():
    module = torch.nn.Sequential(torch.nn.Linear(1500, 1500), torch.nn.Linear(3, 2))
    before = [(p.data_ptr(), p.detach().clone()) for p in module.parameters()]
    use_huge_pages(module)
    for parameter, (place, value) in zip(module.parameters(), before, strict=True):
        assert parameter.data_ptr() == place
        assert torch.equal(parameter, value)


def test_nothing_happens_to_a_model_without_memory():
    use_huge_pages(torch.nn.Linear(2000, 2000, device="meta"))
