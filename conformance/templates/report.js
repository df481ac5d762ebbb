"use strict";
// The page is whole without this: it filters the clauses and copies commands, no more.
(() => {
  const form = document.getElementById("filters");
  const rows = [...document.querySelectorAll("tr[data-clause]")];
  const clauses = new Map([...document.querySelectorAll("details.clause")].map((d) => [d.id, d]));
  const ports = [...document.querySelectorAll("[data-port]")];
  const texts = new Map(rows.map((row) => {
    const told = `${row.textContent} ${clauses.get(row.dataset.clause).textContent}`;
    return [row, told.toLowerCase().replace(/\s+/g, " ")];
  }));

  const chosen = () => {
    const data = new FormData(form);
    return {
      text: data.get("text").trim().toLowerCase().replace(/\s+/g, " "),
      port: data.get("port") || "",
      statuses: new Set(data.getAll("status")),
    };
  };
  const statusesOf = (row, port) =>
    [...row.querySelectorAll("td[data-status]")]
      .filter((cell) => port === "" || cell.dataset.port === port)
      .map((cell) => cell.dataset.status);

  const apply = () => {
    const { text, port, statuses } = chosen();
    const counts = {};
    let shown = 0;
    for (const row of rows) {
      const found = new Set(statusesOf(row, port));
      const told = texts.get(row).includes(text) && found.size > 0;
      // A status counts the clauses that ticking it would show.
      if (told) for (const status of found) counts[status] = (counts[status] || 0) + 1;
      const visible = told && (statuses.size === 0 || [...found].some((s) => statuses.has(s)));
      row.hidden = !visible;
      clauses.get(row.dataset.clause).hidden = !visible;
      shown += visible;
    }
    for (const body of document.querySelectorAll("tbody")) {
      body.hidden = !body.querySelector("tr[data-clause]:not([hidden])");
    }
    for (const cell of ports) cell.hidden = port !== "" && cell.dataset.port !== port;
    for (const count of document.querySelectorAll("[data-count]")) {
      count.textContent = counts[count.dataset.count] || 0;
    }
    document.getElementById("shown").textContent = `${shown} of ${rows.length} clauses`;
    document.getElementById("none").hidden = shown > 0 || rows.length === 0;
  };

  // From a file the clipboard may be refused, and older browsers have none: a selection always works.
  const copy = async (text, source) => {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      const selection = window.getSelection();
      const range = document.createRange();
      range.selectNodeContents(source);
      selection.removeAllRanges();
      selection.addRange(range);
      return document.execCommand("copy");
    }
  };
  for (const button of document.querySelectorAll("button.copy")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const source = button.closest(".again").querySelector("code");
      const done = await copy(source.textContent, source);
      button.textContent = done ? "Copied" : "Selected: press Ctrl+C";
      document.getElementById("announce").textContent = button.textContent;
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }

  // A link into a closed clause opens it.
  const reveal = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const details = target && target.closest("details.clause");
    if (details && !details.open) { details.open = true; target.scrollIntoView(); }
  };
  window.addEventListener("hashchange", reveal);
  window.addEventListener("beforeprint", () => { for (const d of clauses.values()) d.open = true; });
  reveal();

  if (rows.length > 0) {
    form.hidden = false;
    for (const event of ["input", "change"]) form.addEventListener(event, apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(apply));
    apply();
  }
})();
