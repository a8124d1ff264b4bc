/** Puts the parts together. */

import { Api } from "./api.js";
import { Compare } from "./compare.js";
import { showDetails } from "./details.js";
import { askKey, openDialog, showHelp, wireDialogs } from "./dialogs.js";
import { $ } from "./dom.js";
import { Editing } from "./editing.js";
import { showFilters } from "./filters.js";
import { Gallery } from "./gallery.js";
import { Gestures } from "./gestures.js";
import { Live } from "./live.js";
import { clearNotices, notice, problem, status } from "./notices.js";
import { opening } from "./opening.js";
import { Runner } from "./runner.js";
import { drawScene } from "./scene.js";
import { Session } from "./session.js";
import { lettersOn, setLetters, shortcuts } from "./shortcuts.js";
import { Stage } from "./stage.js";
import { tabs } from "./tabs.js";
import { toggleTheme } from "./theme.js";
import { toolbar } from "./toolbar.js";
import { Tools } from "./tools.js";
import { View } from "./view.js";

const HINT = "Paint over the place to edit";

const api = new Api((wrong) => {
  $("key").hidden = false;
  return askKey(wrong);
});
const session = new Session(api);
const view = new View();
const tools = new Tools();
const stage = new Stage($("below"), $("above"), session, view);
const compare = new Compare(stage);
const gallery = new Gallery(session);
const runner = new Runner(api, session);
const editing = new Editing({ session, runner, gallery, stage, compare });
const actions = toolbar({ tools, session, view, stage });
const live = new Live(api);
const pick = opening(open);
const gestures = new Gestures($("above"), { stage, view, tools, session, moveDivider: (x) => compare.moveTo(x), opens: pick });
const views = tabs($("tabs"), (name) => live.show(name === "live"));

async function open(file) {
  views.select("edit");
  clearNotices();
  status("Uploading…");
  try {
    if (await session.open(file, file.name || "pasted")) status(HINT);
  } catch (error) {
    problem("The photo could not be opened", error, { label: "Try again", run: () => reopen(file) });
    status("");
  }
}

/** A photo that is already shown is only uploaded again, and keeps its mask. */
async function reopen(file) {
  if (session.photo?.blob !== file) return open(file);
  try {
    await session.uploaded(session.photo);
    status("Uploaded");
  } catch (error) {
    problem("The photo could not be uploaded", error, { label: "Try again", run: () => reopen(file) });
  }
}

async function continueFrom(result) {
  try {
    await session.continueFrom(result);
    status("The result is the photo now");
  } catch (error) {
    problem("The result could not be uploaded", error);
  }
}

function remove(result) {
  if (!result || result.pending) return;
  const at = session.results.indexOf(result);
  session.removeResults([result]);
  notice("Result deleted.", { kind: "done", action: { label: "Undo", run: () => session.restoreResult(result, at) } });
}

const shown = () => (session.showing === "result" ? session.selected : null);

function act(id, work) {
  $(id).addEventListener("click", () => session.selected && work(session.selected));
}

act("continue", continueFrom);
act("delete", remove);
act("again", (result) => {
  session.again(result);
  editing.fill(result);
  if (runner.idle) status("");
});
$("empty-scene").addEventListener("click", async () => open(new File([await drawScene()], "scene.png", { type: "image/png" })));
$("theme").addEventListener("click", toggleTheme);
$("help-open").addEventListener("click", showHelp);
$("key").addEventListener("click", async () => {
  const key = await askKey(false);
  if (!key) return;
  api.key = key;
  showModel();
});
for (const button of document.querySelectorAll("[data-prompt]")) {
  button.addEventListener("click", () => {
    $("prompt").focus();
    $("prompt").select();
    if (!document.execCommand("insertText", false, button.dataset.prompt)) $("prompt").value = button.dataset.prompt;
  });
}
for (const radio of document.querySelectorAll("[name=showing]")) {
  radio.addEventListener("change", () => session.show(radio.value, session.selected ?? session.results[0]));
}
$("letters").checked = lettersOn();
$("letters").addEventListener("change", () => setLetters($("letters").checked));

session.addEventListener("photo", () => {
  $("edit").classList.add("loaded");
  $("empty").hidden = true;
});
for (const type of ["showing", "results"]) {
  session.addEventListener(type, () => {
    $("showing").hidden = session.results.length === 0;
    for (const radio of document.querySelectorAll("[name=showing]")) radio.checked = radio.value === session.showing;
    showDetails(session);
  });
}
session.addEventListener("paint", () => {
  if ($("status").textContent === HINT) status("");
});
window.addEventListener("pagehide", () => runner.leave());

/** Arrow keys on the stage: the rectangle where that is the tool, otherwise the picture. */
$("above").addEventListener("keydown", (event) => {
  const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
  const boxing = tools.tool === "rectangle" && session.photo && session.showing === "mask";
  const { width, height } = view.picture;
  const step = event.altKey ? 1 : Math.max(1, Math.round(Math.max(width, height) / 64));
  if (dx || dy) {
    if (!session.photo) return;
    event.preventDefault();
    if (!boxing) view.pan(-48 * dx, -48 * dy);
    else if (event.shiftKey) tools.growRectangle(step * dx, step * dy);
    else tools.moveRectangle(step * dx, step * dy);
  } else if (boxing && ["Enter", "Delete", "Backspace"].includes(event.key) && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    session.mask.rectangle(tools.rectangle, event.key === "Enter");
    status(`Mask ${Math.round(session.mask.share * 1000) / 10} % of the photo`);
  }
});

const pickTool = (tool) => () => {
  tools.pick(tool);
  if (session.photo) session.show("mask");
};

function escape() {
  if (gestures.drawing) gestures.abandon();
  else if (!runner.idle) editing.cancel();
  else return false;
}

const other = () => (session.showing === "result" ? "mask" : "result");
const toggleResult = () => session.results.length && session.show(other(), session.selected ?? session.results[0]);

shortcuts(
  {
    b: pickTool("brush"),
    e: pickTool("eraser"),
    r: pickTool("rectangle"),
    h: pickTool("hand"),
    "[": () => tools.nudgeSize(-1),
    "]": () => tools.nudgeSize(1),
    z: actions.undo,
    "shift+z": actions.redo,
    i: actions.invert,
    x: actions.clear,
    m: actions["mask-shown"],
    c: toggleResult,
    o: pick,
    p: () => $("prompt").focus(),
    0: actions["zoom-fit"],
    1: actions["zoom-actual"],
    "+": actions["zoom-in"],
    "=": actions["zoom-in"],
    "-": actions["zoom-out"],
    delete: () => remove(shown()),
    "?": showHelp,
  },
  {
    "mod+enter": () => editing.run(),
    "mod+z": actions.undo,
    "mod+shift+z": actions.redo,
    "mod+y": actions.redo,
    escape,
  },
  {
    active: () => !$("edit").hidden,
    space: (held) => gestures.holdSpace(held),
    overStage: () => $("above").matches(":hover") && !openDialog(),
  },
);

async function showModel() {
  try {
    const models = (await api.models()).data ?? [];
    const [model] = models;
    showFilters(models, (filter, label) => editing.filter(filter, label));
    const { steps, device } = model?.retouch ?? {};
    $("model").textContent = [model?.id, device].filter(Boolean).join(" · ");
    if (steps) $("steps").placeholder = String(steps);
  } catch (error) {
    problem("The server does not tell which model it runs", error);
  }
}

wireDialogs();
if (/Mac|iP(hone|ad)/.test(navigator.platform)) {
  for (const key of document.querySelectorAll("#run-keys, .mod")) key.textContent = key.textContent.replace("Ctrl", "⌘");
}
$("key").hidden = !api.key;
showModel();
