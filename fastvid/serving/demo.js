"use strict";

const $ = (id) => document.getElementById(id);
let key = sessionStorage.getItem("fastvid-key") || "";
let clip = null; // the file, and its name on the server
let turns = []; // of the conversation about it
let looking = 0; // number of the clip that was chosen last
let seenNow = ""; // what is told of the clip that is shown

function tell(text) { $("told").textContent = text; }

function complain(text) {
  $("error").textContent = text || "";
  $("error").hidden = !text;
}

/** fetch with the key, which is asked for where the server wants one. */
async function call(path, options = {}) {
  for (;;) {
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    const response = await fetch(path, { ...options, headers });
    if (response.status !== 401) return response;
    key = window.prompt("This server wants a key:") || "";
    if (!key) return response;
    sessionStorage.setItem("fastvid-key", key);
  }
}

async function fault(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answers ${response.status}`;
  }
}

async function choose(file) {
  const number = ++looking;
  complain("");
  tell(`Looking at ${file.name} …`);
  try {
    const most = Number($("drop").dataset.most);
    if (file.size > most * 2 ** 20) throw new Error(`it has more than ${most} MiB`);
    const response = await call("/demo/look", {
      method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" },
    });
    if (number !== looking) return;
    if (!response.ok) throw new Error(await fault(response));
    const seen = await response.json();
    if (number !== looking) return;
    $("turns").replaceChildren(); // not before: of a file that is no clip the last one stays
    turns = [];
    clip = { file, name: seen.video };
    show(seen);
    const seconds = seen.duration ? `, ${seen.duration.toFixed(1)} s` : "";
    seenNow = `${file.name}: ${seen.width} × ${seen.height}${seconds}, ${seen.frames.length} of ${seen.total_frames} frames, ` +
      `${seen.rows} tokens`;
    tell(seenNow);
    $("question").focus();
  } catch (error) {
    if (number !== looking) return;
    tell(seenNow);
    complain(`${file.name}: ${error.message}`);
  }
}

function show(seen) {
  const shown = seen.frames.map((frame) => {
    const figure = document.createElement("figure");
    const image = document.createElement("img");
    image.src = frame.src;
    image.alt = `frame ${frame.number}`;
    const caption = document.createElement("figcaption");
    caption.textContent = (frame.seconds === null ? "" : `${frame.seconds.toFixed(2)} s, `) + `frame ${frame.number}`;
    figure.append(image);
    if (frame.norm !== null) {
      const bar = document.createElement("div");
      bar.className = "norm";
      bar.append(document.createElement("i"));
      bar.firstChild.style.width = `${Math.round(100 * (0.12 + 0.88 * Math.max(frame.norm, 0)))}%`;
      figure.append(bar);
    }
    figure.append(caption);
    return figure;
  });
  $("frames").replaceChildren(...shown);
  $("strip").innerHTML = seen.strip; // drawn by the server; it holds numbers alone
  $("patches").hidden = seen.heat === null;
  if (seen.heat !== null) {
    $("middle").src = seen.middle;
    $("veil").src = seen.heat;
    $("scale").src = seen.scale;
  }
  $("seen").hidden = $("talk").hidden = false;
}

function dataUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve("data:video/mp4;base64," + reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error("the file cannot be read any more"));
    reader.readAsDataURL(file);
  });
}

function request(url, question) {
  const texts = [...turns.flat(), question];
  const messages = texts.map((text, i) => ({ role: i % 2 ? "assistant" : "user", content: text }));
  messages[0].content = [{ type: "text", text: texts[0] }, { type: "video_url", video_url: { url } }];
  return call("/v1/chat/completions", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ messages, stream: true }),
  });
}

/** The data of each server-sent event of a response. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const whole = held.split("\n\n");
    held = whole.pop();
    for (const event of whole) if (event.startsWith("data: ")) yield event.slice(6);
  }
}

async function ask(question) {
  const turn = document.createElement("div");
  turn.className = "turn busy";
  const [asked, answer] = ["asked", "answer"].map((name) => {
    const line = document.createElement("p");
    line.className = name;
    turn.append(line);
    return line;
  });
  asked.textContent = question;
  $("turns").append(turn);
  const about = clip;
  try {
    let response = await request(about.name, question);
    if (response.status === 400 && (await response.clone().json()).error.code === "video_not_kept") {
      response = await request(await dataUri(about.file), question);
    }
    if (!response.ok) throw new Error(await fault(response));
    for await (const event of events(response)) {
      if (event === "[DONE]") break;
      const piece = JSON.parse(event);
      if (piece.error) throw new Error(piece.error.message);
      answer.textContent += piece.choices[0]?.delta.content ?? "";
    }
    if (about === clip) turns.push([question, answer.textContent]);
  } catch (error) {
    complain(error.message);
  }
  turn.classList.remove("busy");
}

$("file").addEventListener("change", () => {
  if ($("file").files.length) choose($("file").files[0]);
  $("file").value = ""; // so that the same file can be chosen again
});
for (const [name, over] of [["dragenter", true], ["dragover", true], ["dragleave", false], ["drop", false]]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", over);
    if (name === "drop" && event.dataTransfer.files.length) choose(event.dataTransfer.files[0]);
  });
}
$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || $("send").disabled) return;
  $("send").disabled = true;
  $("question").value = "";
  complain("");
  await ask(question);
  $("send").disabled = false;
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("fade").addEventListener("input", () => { $("veil").style.opacity = $("fade").value / 100; });
call("/v1/models").then(async (response) => {
  if (response.ok) $("model").textContent = (await response.json()).data[0].id;
});
