// Shows the values under the cursor, and a line through all charts. The charts do without it.
"use strict";
for (const sheet of document.querySelectorAll(".sheet")) {
  const data = JSON.parse(sheet.querySelector("script.values").textContent);
  const tip = sheet.appendChild(document.createElement("div"));
  tip.className = "tip";

  const units = [[1e12, "T"], [1e9, "B"], [1e6, "M"]];
  const shown = (value) => {
    if (value === null || value === undefined) return "–";
    for (const [size, unit] of units) {
      if (Math.abs(value) >= size) return Number((value / size).toPrecision(4)) + unit;
    }
    const size = Math.abs(value);
    if (size >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
    return size > 0 && size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  };

  const nearest = (places, at) => {
    let best = -1;
    let distance = Infinity;
    places.forEach((place, i) => {
      if (place !== null && Math.abs(place - at) < distance) {
        distance = Math.abs(place - at);
        best = i;
      }
    });
    return best;
  };

  const line = (color, text) => {
    const row = document.createElement("div");
    const patch = row.appendChild(document.createElement("i"));
    patch.className = color;
    row.append(text);
    return row;
  };

  const rows = (plot, at, reach) => {
    const axis = plot.dataset.axis;
    const found = [];
    let place = at;
    for (const series of data.charts[plot.dataset.chart].series) {
      const places = data.tables[series.table][axis];
      const i = nearest(places, at);
      if (i < 0 || Math.abs(places[i] - at) > reach * 10) continue;
      if (!found.length) place = places[i];
      let text = `${series.name} ${shown(series.mean[i])}`;
      if (series.low && series.low[i] !== series.high[i]) {
        text += ` (${shown(series.low[i])} to ${shown(series.high[i])})`;
      }
      found.push(line(series.color, text));
    }
    const marks = data.marks.filter((mark) => Math.abs(mark[axis] - at) <= reach);
    for (const mark of marks.slice(0, 5)) found.push(line(mark.class, mark.text));
    if (marks.length > 5) found.push(line("", `and ${marks.length - 5} more`));
    const head = document.createElement("b");
    head.textContent = `${data.axes[axis]}: ${shown(place)}`;
    return [head, ...found];
  };

  const move = (event) => {
    const plot = event.target.closest(".plot");
    if (!plot) return;
    const box = plot.querySelector(".canvas").getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    if (share < 0 || share > 1) return hide();
    const low = Number(plot.dataset.low);
    const width = plot.dataset.high - low;
    tip.replaceChildren(...rows(plot, low + share * width, (8 / box.width) * width));
    tip.style.display = "block";
    const most = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, most)) + window.scrollX}px`;
    tip.style.top = `${event.clientY + 16 + window.scrollY}px`;
    for (const other of sheet.querySelectorAll(".plot")) {
      const span = other.dataset.high - other.dataset.low;
      const at = (low + share * width - other.dataset.low) / span;
      const cursor = other.querySelector(".cursor");
      cursor.style.left = `${at * 100}%`;
      const same = other.dataset.axis === plot.dataset.axis;
      cursor.style.display = same && at >= 0 && at <= 1 ? "block" : "none";
    }
  };
  const hide = () => {
    tip.style.display = "none";
    for (const cursor of sheet.querySelectorAll(".cursor")) cursor.style.display = "none";
  };
  sheet.addEventListener("pointermove", move);
  sheet.addEventListener("pointerdown", move);
  sheet.addEventListener("pointerleave", hide);
}
