import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are tiny: a second thread only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
