"""What all faults are tried on, made once for each process of tests."""

import pytest
from faults.kinds import World
from faults.runs import Server


@pytest.fixture(scope="session")
def server():
    """Starts commands as processes."""
    found = Server()
    yield found
    found.close()


@pytest.fixture(scope="session")
def world(server, tmp_path_factory):
    """Models, data, and an ensemble."""
    folder = tmp_path_factory.mktemp("world")
    found = World(folder)
    found.make_ensemble(server, folder / "log.txt")
    return found


@pytest.fixture(scope="session")
def whole(server, world, tmp_path_factory):
    """The folder of a run that nothing happens to, by its kind; and how long it takes."""
    made = {}

    def run(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("whole")
            code, seconds = server.run(world.words(kind, folder / "run", "--resume"), folder / "log.txt")
            assert code == 0, (folder / "log.txt").read_text()
            made[kind] = folder / "run", seconds
        return made[kind]

    return run
