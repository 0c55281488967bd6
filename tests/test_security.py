"""What docs/security.md promises of the code as a whole, looked up in its syntax."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(p for folder in ("lumina_jax", "tools") for p in (ROOT / folder).rglob("*.py"))
# Calls that make code, or any object, out of text or bytes.
FORBIDDEN = {
    "eval", "exec", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "marshal.loads", "shelve.open", "dill.load", "dill.loads", "joblib.load", "cloudpickle.load",
    "cloudpickle.loads", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen",
}  # fmt: skip
# Calls that do so unless this is said.
SAFE_IF = {
    "np.load": ("allow_pickle", False),
    "torch.load": ("weights_only", True),
    "AutoTokenizer.from_pretrained": ("trust_remote_code", False),
}
# A file of an installed package, which is code anyway.
OWN_PACKAGES = {("lumina_jax/frozen/use.py", "np.load")}


def calls(text: str):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            said = {
                k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)
            }
            yield ast.unparse(node.func), said


def faults(text: str) -> list[str]:
    found = []
    for name, said in calls(text):
        if name in FORBIDDEN or name.endswith(".extractall") or said.get("shell"):
            found.append(name)
        for safe, (keyword, value) in SAFE_IF.items():
            if name.endswith(safe) and said.get(keyword) is not value:
                found.append(f"{safe} without {keyword}={value}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_becomes_code(path):
    name = str(path.relative_to(ROOT))
    found = [f for f in faults(path.read_text()) if (name, f.split()[0]) not in OWN_PACKAGES]
    assert not found


def test_the_search_finds_what_it_is_for():
    for text in (
        "eval(x)", "pickle.loads(x)", "np.load(x)", "np.load(x, allow_pickle=True)",
        "torch.load(x)", "a.extractall()", "subprocess.run(x, shell=True)", "yaml.load(x)",
        "transformers.AutoTokenizer.from_pretrained(x)",
    ):  # fmt: skip
        assert faults(text), text
    assert not faults("np.load(x, allow_pickle=False); model.eval(); ast.literal_eval(x)")
