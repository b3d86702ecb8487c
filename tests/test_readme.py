"""Does the README's code run as printed, and is CI what it says?"""

import inspect
import re
from pathlib import Path

import pytest

from lightning_diloco import DilocoSimulator

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\S+)(?: (\w+))?\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:GPU available but not used")
def test_the_code_runs_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {}
    code = [text for language, tag, text in BLOCKS if language == "python" and not tag]
    for block in code:
        exec(compile(block, "README.md", "exec"), namespace)  # the README's own code
    assert len(code) == 6
    out = capsys.readouterr().out
    assert "step 4: the workers' pseudo-gradients have a mean cosine of" in out
    assert "outer step 4 after 100 local steps: accuracy " in out


def test_the_first_block_stands_in_the_example() -> None:
    (block,) = [text for _, tag, text in BLOCKS if tag == "digits"]
    assert block in (ROOT / "examples" / "digits.py").read_text()
    assert README.index("```python digits") < README.index("```text") < README.index("## Set-up")


def test_the_yaml_block_stands_in_the_configuration() -> None:
    (block,) = [text for language, _, text in BLOCKS if language == "yaml"]
    assert block in (ROOT / "examples" / "configs" / "digits.yaml").read_text()


def test_the_table_for_the_simulator_is_complete() -> None:
    table = README[README.index("| simulator | Lightning |") :].split("\n\n")[0]
    beyond = {"strategy_kwargs", "trainer_kwargs", "seed"}
    assert set(re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in table.splitlines()))) == (
        set(inspect.signature(DilocoSimulator).parameters) - beyond
    )


def test_there_are_two_commands_and_ci_runs_them() -> None:
    (block,) = [text for _, tag, text in BLOCKS if tag == "setup"]
    commands = block.strip().splitlines()
    assert len(commands) == 2
    assert commands[0].endswith("python examples/digits.py")
    assert commands[1].endswith("python -m pytest")
    assert all(command.startswith("pip install -c tests/constraints.txt -e ") for command in commands)
    ci = (ROOT / ".ci" / "run").read_text()
    assert "sed -n '/^```sh setup$/,/^```$/p' README.md" in ci


def test_the_ten_line_algorithm_is_about_ten_lines() -> None:
    (block,) = [text for _, _, text in BLOCKS if "class PeriodicAveraging" in text]
    body = block[block.index("class PeriodicAveraging") : block.index("strategy =")].strip().splitlines()
    assert len(body) <= 10


def test_every_file_that_the_readme_links_to_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://arxiv.org/") or (ROOT / target).exists(), target
