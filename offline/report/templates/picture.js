
// Images: the pointer or the arrow keys pick a cell, and a line says what it is.
function cellsOf(stage) {
  const grid = stage.querySelector("[data-cells]");
  const { width: columns, height: rows } = grid.viewBox.baseVal;
  return { grid, columns, rows, spot: grid.querySelector(".spot") };
}
function aim(stage, row, column) {
  const { grid, columns, spot } = cellsOf(stage);
  const picture = stage.closest(".picture");
  for (const other of picture.querySelectorAll(".stage")) other.classList.toggle("on", other === stage);
  spot.setAttribute("x", column);
  spot.setAttribute("y", row);
  Object.assign(stage.dataset, { row, column });
  const [, score, mark] = /^(.+?)([+!-]?)$/.exec(grid.dataset.cells.split(" ")[row * columns + column]);
  const words = [`row ${row + 1}, column ${column + 1}: ` + (score === "-" ? "no token"
    : score.replace(/^(?!-)/, "+").replaceAll("-", "−"))];
  if (mark === "+") words.push("in T+");
  if (mark === "-") words.push("in T−");
  if (mark === "!") words.push("cannot be chosen");
  const name = picture.querySelectorAll(".stage").length > 1 ? `${stage.dataset.name}, ` : "";
  picture.querySelector(".cell").textContent = name + words.join(", ");
}
function leave(stage) {
  stage.classList.remove("on");
  stage.closest(".picture").querySelector(".cell").textContent = "";
}
for (const stage of document.querySelectorAll(".stage")) {
  stage.tabIndex = 0;
  const point = (event) => {
    const { grid, columns, rows } = cellsOf(stage);
    const shades = grid.querySelector("g"); // whose unit is a cell, half a row further down
    const place = new DOMPoint(event.clientX, event.clientY)
      .matrixTransform(shades.getScreenCTM().inverse());
    const row = Math.floor(place.y + 0.5), column = Math.floor(place.x);
    if (row >= 0 && row < rows && column >= 0 && column < columns) aim(stage, row, column);
  };
  stage.addEventListener("pointermove", point);
  stage.addEventListener("pointerdown", point);
  stage.addEventListener("focusout", () => leave(stage));
  stage.addEventListener("keydown", (event) => {
    if (event.key === "Escape") leave(stage);
    const { columns, rows } = cellsOf(stage);
    const on = stage.classList.contains("on");
    const row = on ? +stage.dataset.row : 0, column = on ? +stage.dataset.column : 0;
    const next = {
      ArrowRight: [row, on ? Math.min(column + 1, columns - 1) : column],
      ArrowLeft: [row, Math.max(column - 1, 0)],
      ArrowDown: [on ? Math.min(row + 1, rows - 1) : row, column],
      ArrowUp: [Math.max(row - 1, 0), column],
      Home: [row, 0],
      End: [row, columns - 1],
    }[event.key];
    if (!next) return;
    event.preventDefault();
    aim(stage, ...next);
  });
}

// A chip stands for many tokens: those behind it are numbered as in the whole prompt.
const pickShown = pick;
pick = (prompt, token) => {
  pickShown(prompt, token);
  if (!token) return;
  const line = prompt.parentElement.querySelector(".read");
  const shown = [...prompt.querySelectorAll("[data-s]")];
  const position = shown.slice(0, shown.indexOf(token))
    .reduce((sum, other) => sum + (+other.dataset.n || 1), 0);
  line.textContent = token.matches(".chip") ? token.textContent
    : line.textContent.replace(/^token \d+/, `token ${position}`);
};
