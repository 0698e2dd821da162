// What the page gains from a script: sorting, filtering, tooltips, choices, copying. It is complete without.
"use strict";
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const make = (tag, attributes = {}, ...inside) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...inside);
  return made;
};
for (const controls of all(".controls")) controls.hidden = false;

// -- tables: a click on a heading sorts
for (const table of all("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = make("button", { type: "button" }, ...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const first = head.dataset.first || "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? other : first;
      for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === "");  // what was not measured stays last
        return sign * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
      });
      body.append(...rows);
    });
  });
}

// -- filter: arms that are not asked for leave the tables and fade in the charts
const filter = document.querySelector(".filter"), verdict = document.querySelector(".verdict");
if (filter) {
  const kinds = new Map(all("#arms ~ .tablebox tbody tr").map((row) => [row.dataset.arm, row.className]));
  const wanted = (arm) => {
    const kind = kinds.get(arm) === "worse" ? "worse" : "tied";
    return arm.toLowerCase().includes(filter.value.trim().toLowerCase()) && (!verdict.value || verdict.value === kind);
  };
  const apply = () => {
    for (const found of all("[data-arm]")) {
      if (!kinds.has(found.dataset.arm)) continue;
      const out = !wanted(found.dataset.arm);
      if (found.closest("svg")) found.classList.toggle("out", out);
      else found.hidden = out;
    }
    const left = [...kinds.keys()].filter(wanted).length;
    document.querySelector(".filtered").textContent = left < kinds.size ? `${left} of ${kinds.size} arms, everywhere on this page` : "";
  };
  filter.addEventListener("input", apply);
  verdict.addEventListener("change", apply);
}

// -- charts: the text of a mark on hover, and on the arrow keys when the chart has the focus
const tip = document.querySelector(".tip");
const text = new WeakMap();
const hide = () => {
  tip.hidden = true;
  for (const lit of all(".lit")) lit.classList.remove("lit");
};
const light = (mark) => {
  hide();
  tip.textContent = text.get(mark);
  tip.hidden = false;
  const at = mark.querySelector(".mark, .curve, text, line") || mark;
  const box = at.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left + box.width / 2 - own.width / 2), innerWidth - own.width - 8);
  const above = box.top - own.height - 10;
  tip.style.left = `${left + scrollX}px`;
  tip.style.top = `${(above > 4 ? above : box.bottom + 10) + scrollY}px`;
  const chart = mark.closest("svg"), arm = mark.dataset.arm;
  for (const part of [mark, ...all("g[data-arm]", chart).filter((part) => arm && part.dataset.arm === arm)]) part.classList.add("lit");
  chart.classList.add("lit");
};
for (const chart of all("svg")) {
  const marks = all("g[data-arm]", chart).filter((mark) => {
    const title = mark.querySelector("title");
    if (!title) return false;
    text.set(mark, title.textContent);
    title.remove();  // else the browser shows it a second time
    mark.addEventListener("pointerenter", () => light(mark));
    mark.addEventListener("pointerleave", hide);
    return true;
  });
  if (!marks.length) continue;
  chart.setAttribute("tabindex", "0");
  chart.setAttribute("role", "group");
  chart.setAttribute("aria-roledescription", "chart");
  let place = -1;
  chart.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") hide();
    if (!step) return;
    event.preventDefault();
    place = (place + step + marks.length) % marks.length;
    light(marks[place]);
  });
  chart.addEventListener("blur", hide);
}
addEventListener("keydown", (event) => event.key === "Escape" && hide());

// -- what is folded is printed too
addEventListener("beforeprint", () => all("details").forEach((details) => (details.open = true)));

// -- the price on the horizontal axis
const axis = document.querySelector("select.axis");
if (axis) {
  axis.addEventListener("change", () => {
    for (const figure of all("figure[data-cost]")) figure.hidden = axis.value !== "" && figure.dataset.cost !== axis.value;
    document.querySelector(".prices").classList.toggle("one", axis.value !== "");
  });
}

// -- disagreements of any two arms
const held = document.getElementById("item-data");
if (held) {
  const data = JSON.parse(held.textContent), STEP = 12;
  const home = held.closest("section"), place = home.querySelector(".disputed");
  const [first, second, side, search] = ["first", "second", "side", "search"].map((name) => home.querySelector("." + name));
  let most = STEP;
  [first, second].forEach((select, which) => {
    data.arms.forEach((arm, number) => select.append(make("option", { value: number }, arm)));
    select.value = data.first[which];
  });
  const score = (item, arm) => {
    const value = data.binary ? `right in ${Math.round(item.s[arm] * data.seeds)} of ${data.seeds}` : item.s[arm].toPrecision(4);
    const said = item.p[arm] < 0 ? [] : [make("b", {}, data.said[item.p[arm]]), ", "];
    return [data.arms[arm] + ": ", ...said, value];
  };
  const line = (item, a, b) => {
    const what = make("p", { class: "what" }, item.t || `item ${item.i}`);
    const label = item.l ? [make("span", {}, "label ", make("b", {}, item.l), " ·"), " "] : [];
    const said = make("p", { class: "said" }, ...label,
      make("span", {}, ...score(item, a), " ·"), " ", make("span", {}, ...score(item, b)));
    const picture = item.g ? [make("img", { src: item.g, alt: `picture of item ${item.i}` })] : [];
    return make("li", {}, ...picture, make("div", {}, what, said));
  };
  const show = () => {
    const [a, b] = [Number(first.value), Number(second.value)];
    place.replaceChildren();
    if (a === b) return place.append(make("p", { class: "says" }, "Choose two different arms."));
    const pair = data.pairs[a < b ? `${a},${b}` : `${b},${a}`], [more, less] = a < b ? pair : [pair[1], pair[0]];
    const words = search.value.trim().toLowerCase();
    const found = data.items
      .filter((item) => Math.abs(item.s[a] - item.s[b]) >= data.least)
      .filter((item) => side.value === "both" || data.sign * (item.s[a] - item.s[b]) > 0 === (side.value === "first"))
      .filter((item) => !words || `${item.t || ""} ${item.l || ""} ${item.i}`.toLowerCase().includes(words))
      .sort((x, y) => Math.abs(y.s[a] - y.s[b]) - Math.abs(x.s[a] - x.s[b]));
    const says = make("p", { class: "says" }, make("b", {}, data.arms[a]), ` is better on ${more} items, `,
      make("b", {}, data.arms[b]), ` on ${less}, of ${data.all}. `,
      `${Math.min(most, found.length)} of the ${found.length} that can be shown and match:`);
    place.append(says, make("ol", { class: "disputes" }, ...found.slice(0, most).map((item) => line(item, a, b))));
    if (found.length > most) {
      const further = make("button", { type: "button", class: "plain" }, `Show ${Math.min(2 * STEP, found.length - most)} more`);
      further.addEventListener("click", () => { most += 2 * STEP; show(); });
      place.append(further);
    }
  };
  for (const control of [first, second, side]) control.addEventListener("change", () => { most = STEP; show(); });
  search.addEventListener("input", () => { most = STEP; show(); });
  show();
}

// -- copying a command
for (const button of all(".copy")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const command = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(command.textContent);
      button.textContent = "Copied";
    } catch {  // no permission: what is selected can be copied by hand
      getSelection().selectAllChildren(command);
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
}
