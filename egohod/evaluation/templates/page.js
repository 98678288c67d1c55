"use strict";
// A filter field shows the rows of its table in which every typed word occurs.
for (const field of document.querySelectorAll("input[data-filters]")) {
  const table = document.getElementById(field.dataset.filters);
  const counter = document.getElementById(field.dataset.filters + "-count");
  const rows = [...table.tBodies[0].rows];
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.cells[0].textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += row.hidden ? 0 : 1;
    }
    counter.textContent = `${shown} of ${rows.length}`;
  });
}
// A group of fields shows the cards that fit all of them: every word typed, every choice made. Keys: / to the words,
// j and k from card to card, Escape shows all.
for (const group of document.querySelectorAll("[data-cards]")) {
  const cards = [...document.getElementById(group.dataset.cards).children];
  const counter = group.querySelector("output");
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input, select, textarea");
    if (event.ctrlKey || event.altKey || event.metaKey || (typing && event.key !== "Escape")) return;
    if (event.key === "/") {
      group.querySelector("input").focus();
    } else if (event.key === "Escape") {
      for (const field of group.querySelectorAll("input, select")) field.value = "";
      group.dispatchEvent(new Event("input"));
      event.target.blur();
    } else if (event.key === "j" || event.key === "k") {
      const shown = cards.filter((card) => !card.hidden);
      const at = shown.indexOf(document.activeElement);
      const next = event.key === "j" ? at + 1 : (at < 0 ? shown.length : at) - 1;
      shown[Math.max(0, Math.min(next, shown.length - 1))]?.focus();
    } else {
      return;
    }
    event.preventDefault();
  });
  group.addEventListener("input", () => {
    const words = group.querySelector("input").value.toLowerCase().split(/\s+/).filter(Boolean);
    const choices = [...group.querySelectorAll("select")].filter((each) => each.value);
    let shown = 0;
    for (const card of cards) {
      const text = card.textContent.toLowerCase();
      const fits = choices.every((each) => card.dataset[each.name].split("|").includes(each.value));
      card.hidden = !(fits && words.every((word) => text.includes(word)));
      shown += card.hidden ? 0 : 1;
    }
    counter.textContent = `${shown} of ${cards.length}`;
  });
}
